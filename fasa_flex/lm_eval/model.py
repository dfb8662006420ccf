"""``fasa_hf``: lm-eval's Hugging Face model with sparse attention, and with an account of what was sparse."""

from __future__ import annotations

import inspect
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.baselines import Method
from fasa_flex.config import Backend, GroupReduce, Sharing
from fasa_flex.lm_eval.arguments import (
    LayerSet,
    check_batch_size,
    check_tokens,
    check_unknown,
    layer_set,
    scorer_of,
    sinks,
)
from fasa_flex.lm_eval.windows import Batch, Window, score

Request = tuple[tuple[str, str] | None, list[int], list[int]]

_log = logging.getLogger(__name__)


@register_model("fasa_hf")
class FasaHFLM(HFLM):
    """A Hugging Face causal model under FASA, or under a baseline at the same budget, for lm-eval.

    Generation prefills densely and decodes sparsely. Log-likelihoods are one forward pass in which the context's
    queries are dense and the continuation's queries select for themselves, which equals decoding it token by token
    (`fasa_flex.lm_eval.windows`). ``results["config"]["fasa"]`` says what ran: parameters, profile, versions, and for
    each kind of request how many queries were dense and sparse and which share of their keys the sparse ones read.

    Args:
        pretrained: Folder, repository or model object, as for ``hf``.
        profile: Folder or repository of the model's `FasaProfile`, or the profile itself.
        method: ``fasa``, or a baseline at the same budget: ``streaming_llm`` (sinks and recent tokens), ``oracle``
            (exact scores) or ``random_chunks``.
        n_tip: Chunks scored per head; None for an eighth of the head dimension.
        n_fac: The budget: tokens (int) or share of the valid keys (float in (0, 1]).
        n_sink: First tokens always selected, inside the budget; None for 0, and 8 under ``streaming_llm``.
        n_recent: Last tokens always selected, inside the budget.
        dense_layers: Layers that stay dense: ``0``, ``0+1`` or ``none``.
        per: ``kv_head`` or ``query_head``.
        group_reduce: How a group's query heads become one ranking.
        backend: ``auto``, ``flex``, ``gather`` or ``reference``.
        sparse_tail: How many of a prompt's last queries are sparse, too. With 0, the first token of every answer comes
            from a dense query, and a one-token continuation says nothing about the method.
        dense_prefix: In rolling log-likelihoods, queries at the start of each window that stay dense. With 0 the
            queries within the budget still equal dense ones, since they read every key.
        on_truncation: ``count`` inputs longer than the model's maximum, or raise an ``error``.
        batch_size: A number; ``auto`` is refused.
        hf_args: Everything else ``hf`` understands.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        profile: str | FasaProfile | None = None,
        method: Literal["fasa"] | Method = "fasa",
        n_tip: int | None = None,
        n_fac: int | float = 256,
        n_sink: int | None = None,
        n_recent: int = 0,
        dense_layers: LayerSet = 0,
        per: Sharing = "kv_head",
        group_reduce: GroupReduce = "softmax",
        backend: Backend = "auto",
        sparse_tail: int = 0,
        dense_prefix: int = 0,
        on_truncation: Literal["count", "error"] = "count",
        batch_size: int | str | None = 1,
        **hf_args: Any,
    ) -> None:
        check_batch_size(batch_size)
        check_unknown(hf_args, inspect.signature(FasaHFLM.__init__).parameters, loads=isinstance(pretrained, str))
        if on_truncation not in ("count", "error"):
            raise ValueError(f"on_truncation={on_truncation!r} is not an option: write count or error")
        check_tokens("sparse_tail", sparse_tail)
        check_tokens("dense_prefix", dense_prefix)
        config = FasaConfig(
            n_tip=n_tip,
            n_fac=n_fac,
            n_sink=sinks(method, n_fac) if n_sink is None else n_sink,
            n_recent=n_recent,
            dense_layers=layer_set(dense_layers),
            per=per,
            group_reduce=group_reduce,
            backend=backend,
        )
        super().__init__(pretrained, backend="causal", batch_size=batch_size, **hf_args)
        if isinstance(profile, str):
            profile = FasaProfile.from_pretrained(profile)
        self.fasa = enable(self.model, profile, config, scorer=scorer_of(method, profile, config))
        self.method, self.profile, self.fasa_config = method, profile, config
        self.sparse_tail, self.dense_prefix, self.on_truncation = sparse_tail, dense_prefix, on_truncation
        self.truncated = 0
        self._counts: dict[str, Counter[str]] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: the context's queries dense, the continuation's sparse."""
        with self._counted("loglikelihood"):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the maximum length: every query sparse behind ``dense_prefix``."""
        with self._counted("loglikelihood_rolling"):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate with dense prefill and sparse decoding."""
        with self._counted("generate_until"):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """One forward pass a batch, longest requests first.

        Requests are never grouped by their tokens as lm-eval's ``logits_cache`` does: the same tokens with another
        boundary have other sparse queries.
        """
        order = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        results: list[tuple[float, bool]] = []
        quiet, rolling = disable_tqdm or self.rank != 0, override_bs is not None
        with tqdm(total=len(requests), disable=quiet, leave=not rolling, desc="fasa_hf: log-likelihoods") as bar:
            for chunk in order.get_batched(n=override_bs or self.batch_size):
                for (key, _, _), answer in zip(
                    chunk, self._score([self._window(*item) for item in chunk]), strict=True
                ):
                    if key is not None:  # rolling requests are cached as a whole by their own method
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    results.append(answer)
                    bar.update()
        original: list[tuple[float, bool]] = order.get_original(results)
        return original

    def _window(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Window:
        rolling = key is None
        window = Window.of(
            context,
            continuation,
            self.max_length,
            sparse_tail=0 if rolling else self.sparse_tail,
            dense_prefix=self.dense_prefix if rolling else 0,
        )
        if window.dropped:
            self._truncate(len(context) + len(continuation))
        return window

    @torch.no_grad()
    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        batch = Batch.of(windows, pad=self.tokenizer.pad_token_id, device=self.device)
        with self._autocast(), self.fasa.sparse_from(batch.start, batch.stop):
            logits: Tensor = self.model(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=batch.keep
            ).logits
        rows = batch.rows(logits, windows)
        return [score(row, window.targets, self.softmax_dtype) for row, window in zip(rows, windows, strict=True)]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        if not self.sparse_tail:
            return super()._model_generate(context, max_length, stop, **generation)
        boundary = torch.tensor([max(0, context.shape[1] - self.sparse_tail)])  # one for all rows, padded on the left
        with self.fasa.sparse_from(boundary):
            return super()._model_generate(context, max_length, stop, **generation)

    def _autocast(self) -> torch.autocast:
        dtype: torch.dtype | None = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As lm-eval's, with the prompts that lose tokens on the left counted."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        for length in mask.sum(1).tolist() if left_truncate_len else ():
            if length > left_truncate_len:
                self._truncate(length)
        return (ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]) if left_truncate_len else (ids, mask)

    def _truncate(self, length: int) -> None:
        if self.on_truncation == "error":
            raise ValueError(
                f"an input of {length} tokens exceeds the model's maximum of {self.max_length} tokens less the answer: "
                "shorten the task's documents, or pass on_truncation=count to cut it on the left"
            )
        self.truncated += 1

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse a ``--use_cache`` file with answers of another model or budget: its keys are the prompts alone."""
        answers = cache_hook.dbdict
        if answers is not None:
            mine = json.dumps({"pretrained": str(self.pretrained), **self._parameters()}, sort_keys=True)
            if len(answers) and answers.get("fasa_hf") != mine:
                raise ValueError(
                    f"the answers in {answers.filename} are another model's, or this one's with other parameters: "
                    "give --use_cache a path of its own for each"
                )
            answers["fasa_hf"] = mine
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's facts about the model, and under ``fasa`` everything that decides a sparse score."""
        if self.truncated:
            _log.warning("fasa_hf: %d inputs were too long and lost tokens on the left", self.truncated)
        return super().get_model_info() | {
            "fasa": {
                **self._parameters(),
                "requests": {kind: _described(counts) for kind, counts in self._counts.items()},
                "truncated_inputs": self.truncated,
                "counted_processes": f"1 of {self.world_size}",
                "versions": {name: version(name) for name in ("fasa-flex", "lm-eval", "torch", "transformers")},
            }
        }

    def _parameters(self) -> dict[str, Any]:
        return {
            "method": self.method,
            **self.fasa_config.to_dict(),
            "profile": self.profile.fingerprint if self.profile else None,
            "sparse_tail": self.sparse_tail,
            "dense_prefix": self.dense_prefix,
        }

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        """Book the queries of a run under its kind of request, and say so if none of them was sparse."""
        before = self._totals()
        yield
        run = self._totals()
        run.subtract(before)
        self._counts.setdefault(kind, Counter()).update(run)
        if not run["sparse"]:
            _log.warning(
                "fasa_hf: NO SPARSE QUERY in %s requests, this result is dense attention: the budget may cover every "
                "context, continuations of one token may come from the prompt's last query alone (pass sparse_tail=1), "
                "dense_layers may name every layer, or --use_cache may have answered",
                kind,
            )

    def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for layer in self.fasa.stats.per_layer:
            totals["dense"] += layer.dense_queries
            totals["sparse"] += layer.sparse_queries
            totals["selected"] += round(layer.mean_selected * layer.sparse_queries)
            totals["valid"] += round(layer.mean_valid * layer.sparse_queries)
        return totals


def _described(counts: Counter[str]) -> dict[str, Any]:
    share = counts["selected"] / counts["valid"] if counts["valid"] else None
    return {"dense_queries": counts["dense"], "sparse_queries": counts["sparse"], "kv_share": share}
