"""Scores of documents under arms: a dense prefix runs once, then each arm decodes the tail on a copy of its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from evals.quality.real_arms import ESTIMATORS, Arm, Lengths
from evals.quality.real_documents import Document
from evals.quality.real_results import Results
from fasa_flex import FasaProfile, enable
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.model.handle import Fasa
from fasa_flex.model.stats import read_share

MOST_TOKENS = 60_000
"""Most tokens of documents that run together, which bounds the memory of a forward."""


class Evaluation:
    """A model, its profile and arms, and their scores.

    Args:
        model: the model.
        profile: its profile.
        arms: arms by name.
        results: the results, updated by `score`.
        lengths: lengths of all documents.
        channels: channel weights of Double Sparsity.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: FasaProfile,
        arms: dict[str, Arm],
        results: Results,
        lengths: Lengths,
        channels: Callable[[], Tensor],
    ) -> None:
        self.model, self.profile, self.arms, self.results, self.lengths = model, profile, arms, results, lengths
        self._channels = channels

    def lacks(self, kind: str, name: str) -> set[str]:
        """The arms whose score of a document is missing; ``dense`` is included if any other is."""
        length, number = map(int, name.split("/"))
        wanted = {key for key, arm in self.arms.items() if arm.reaches(kind, length, number, self.lengths)}
        return wanted - self.results[kind].get(name, {}).keys()

    @torch.no_grad()
    def score(self, documents: list[Document]) -> None:
        """Score each document under its missing arms.

        The score is nats a token of a window's tail, or 1 if a needle was found and else 0.
        """
        caches = {document[:2]: self._prefix(document) for document in documents if self._continues(document)}
        for name, arm in self.arms.items():
            todo = [document for document in documents if name in self.lacks(*document[:2])]
            with self._enabled(arm) if todo else nullcontext() as fasa:
                for group in _of_equal_shape(todo) if arm.sees_prefix else [[document] for document in todo]:
                    rows = self._whole(group, fasa) if arm.sees_prefix else self._tail(*group, caches, fasa)
                    for document, logits in zip(group, rows, strict=True):
                        self.results[document.kind].setdefault(document.name, {})[name] = _score(document, logits)
                    if fasa is not None:
                        key = f"{name} @ {len(group[0].ids) // 100 * 100}"
                        self.results["bytes_read_share"][key] = fasa.stats.kv_bytes_share
                        if arm.prefills:
                            self.results["block_share"][key] = fasa.stats.block_share
                        fasa.stats.reset()

    def _continues(self, document: Document) -> bool:
        """Whether a missing arm decodes on a copy of a document's cache."""
        return any(not self.arms[name].sees_prefix for name in self.lacks(*document[:2]))

    def _enabled(self, arm: Arm) -> AbstractContextManager[Fasa | None]:
        if arm.config is None:
            return nullcontext()
        scorer = arm.scorer(self.profile, self._channels)
        fasa = enable(self.model, self.profile, arm.config, scorer=scorer, estimator=ESTIMATORS[arm.estimator])
        # bytes are counted for a 16-bit cache, also if another precision is evaluated
        dtype, packs = torch.bfloat16, arm.config.per == "kv_head"
        given = (self.model, arm.config, packs, fasa.completion, dtype)
        fasa.stats._reads = {
            number: read_share(layer.scorer, *given) for number, layer in fasa._layers.items() if layer.scorer
        }
        return fasa

    def _prefix(self, document: Document) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        ids = document.ids[None, : document.prefix].to(self.model.device)
        self.model(ids, logits_to_keep=1, **cache_argument(self.model, cache))
        return cache

    def _tail(self, document: Document, caches: Mapping[Any, DynamicCache], fasa: Fasa | None) -> Tensor:
        """Logits of the scored tokens, decoded after the dense prefix: [1, n, V]."""
        ids, prefix = document.ids[None].to(self.model.device), document.prefix
        copied = cache_argument(self.model, copy.deepcopy(caches[document[:2]]))
        with nullcontext() if fasa is None else fasa.sparse_from(torch.tensor([prefix])):
            kept: Tensor = self.model(ids[:, prefix:], logits_to_keep=document.scored + 1, **copied).logits[:, :-1]
        return kept

    def _whole(self, documents: list[Document], fasa: Fasa | None) -> Tensor:
        """Logits of the scored tokens, [B, n, V], from one forward, whose dense queries of the prefix are seen, too.

        Args:
            documents: B documents of equal shape; a step of a method that evicts costs many about as much as one.
            fasa: of the arm.
        """
        assert fasa is not None
        prefix, scored = documents[0].prefix, documents[0].scored
        with fasa.sparse_from(torch.tensor([prefix] * len(documents))):
            ids = torch.stack([document.ids for document in documents]).to(self.model.device)
            kept: Tensor = self.model(ids, use_cache=False, logits_to_keep=scored + 1).logits[:, :-1]
        return kept


def _of_equal_shape(documents: list[Document]) -> list[list[Document]]:
    """Documents grouped by their numbers of tokens, of the prefix and of scored tokens, up to `MOST_TOKENS`."""
    groups: dict[tuple[int, ...], list[Document]] = {}
    for document in documents:
        groups.setdefault((len(document.ids), document.prefix, document.scored), []).append(document)
    parts = []
    for (length, *_), group in groups.items():
        most = max(1, MOST_TOKENS // length)
        parts += [group[at : at + most] for at in range(0, len(group), most)]
    return parts


def _score(document: Document, logits: Tensor) -> float:
    targets = document.ids[-document.scored :].to(logits.device)
    if document.kind == "windows":
        return cross_entropy(logits.float(), targets).item()
    return float((logits.argmax(-1) == targets).all())
