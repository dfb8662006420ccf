"""Decode steps of the reference model from dense forwards: queries and keys of every layer, and rankings of keys.

One document gives both kinds of step. The haystack ends on a line of plain source, so its last queries are steps that
write text; the question and its answer follow, whose queries look for a fact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from evals.quality.arms import ANSWER_TOKENS, FORMER, haystack
from fasa_flex import FasaProfile, RotaryLayout, contextual_agreement
from fasa_flex.baselines import AllDimensions, Recency
from fasa_flex.calibration.provenance import Provenance
from fasa_flex.core.budget import Budget
from fasa_flex.core.config import GroupReduce, Sharing
from fasa_flex.core.group_reduce import reduce_group
from fasa_flex.core.ranking import INVALID, rank_keys, slot_of
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.core.selection import forced_keys, valid_keys
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.attention_call import AttentionCall
from fasa_flex.hf.attention_routing import reading

KINDS = ("answer", "text")
TEXT_TOKENS = 16
"""Steps of a document that write plain text."""
WINDOW = 32
"""Prompt queries before the first step: SnapKV's observation window."""
BUDGETS = (16, 64, 256)
N_TIP = 8
"""A quarter of the 32 chunks, as the paper's 16 of 64."""
TOP_K = 256
"""K of the calibration, as in the paper."""
DEEPEST = 1024
"""Number of a query's best slots that are ranked."""
SINKS = 8
KERNEL = 7
"""Width of SnapKV's max-pooling."""
DRAWS = 2000


@dataclass(frozen=True)
class Steps:
    """Decode steps of one document, with layers in the first dimension.

    Attributes:
        query: float32 [L, Hq, Q, D], post-RoPE, of the last Q positions.
        window: float32 [L, Hq, WINDOW, D], the queries before them.
        key: float32 [L, Hkv, T, D], post-RoPE.
    """

    query: Tensor
    window: Tensor
    key: Tensor

    @classmethod
    def last(cls, query: Tensor, key: Tensor, steps: int) -> Steps:
        """The last ``steps`` positions of queries [L, Hq, T, D] and their keys [L, Hkv, T, D]."""
        return cls(query[:, :, -steps:].clone(), query[:, :, -steps - WINDOW : -steps].clone(), key)


@torch.no_grad()
def steps_of(
    model: PreTrainedModel, tokenizer: Any, seed: str, length: int, text: str | None = None
) -> dict[str, Steps]:
    """The steps of both `KINDS` in one document, from one dense forward; the answer is the true one.

    Args:
        model: the reference model.
        tokenizer: its tokenizer.
        seed: the document's seed.
        length: most tokens of its prompt.
        text: the text to cut from; None: the held-out text.
    """
    found = haystack(seed, length, tokenizer, text)
    ids = torch.tensor(tokenizer(f"{found.prompt}{found.answer}\n").input_ids, device=model.device)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        seen[call.layer] = call.query[0].float(), call.key[0].float()

    with reading(model, keep):
        model.base_model(input_ids=ids[None], use_cache=False)
    query, key = (torch.stack([seen[layer][i] for layer in sorted(seen)]) for i in range(2))
    end = len(tokenizer(found.text).input_ids)
    return {
        "answer": Steps.last(query, key, ANSWER_TOKENS),
        "text": Steps.last(query[:, :, :end], key[:, :, :end], TEXT_TOKENS),
    }


def profile_of(
    model: PreTrainedModel, documents: Sequence[Steps], layout: RotaryLayout, top_k: int = TOP_K
) -> FasaProfile:
    """The profile of `fasa_flex.calibrate`, from known steps and for any layout."""
    tables = [
        torch.stack(
            [contextual_agreement(q[None], k[None], layout, top_k) for q, k in zip(d.query, d.key, strict=True)]
        )
        for d in documents
    ]
    steps = documents[0].query.shape[2]
    provenance = Provenance.of(model, top_k=top_k, max_new_tokens=steps, queries=steps * len(documents))
    return FasaProfile(torch.stack(tables).mean(0).cpu(), layout, provenance)


def dominant(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head") -> Callable[[int], Scorer]:
    """Makes each layer's scorer with the profile's dominant chunks by agreement."""
    dims = profile.dominant_dims(n_tip, per, FORMER["criterion"])
    return lambda layer: DominantChunks.from_chunks(dims[layer])


def oracle(layer: int) -> Scorer:
    """The full dot product."""
    return AllDimensions()


def valid_of(steps: Steps) -> Tensor:
    """The valid keys: bool [1, 1, 1, Q, T]."""
    return valid_keys(steps.query.shape[2], steps.key.shape[2], None, steps.key.device)


def attention(steps: Steps, scaling: float) -> Tensor:
    """The model's attention weights: float32 [L, Hkv, G, Q, T]."""
    return torch.where(valid_of(steps), scored(oracle, steps) * scaling, -torch.inf).softmax(-1)


def ranked(scores: Tensor, valid: Tensor, first: Tensor | None = None) -> Tensor:
    """The best `DEEPEST` valid slots of every query, best first: int64 [B, H, G, Q, DEEPEST].

    Args:
        scores: float32 [B, H, G, Q, T].
        valid: bool [B or 1, 1, 1, Q, T].
        first: bool, as ``valid``: slots that rank above all others.
    """
    order = torch.where(valid, rank_keys(scores, first=first), INVALID)
    return slot_of(order.topk(DEEPEST, dim=-1).values, scores.shape[-1])


def shared_ranking(scores: Tensor, valid: Tensor, scaling: float, how: GroupReduce = FORMER["group_reduce"]) -> Tensor:
    """A group's common ranking, or for ``"none"`` the scores: float32 [L, Hkv, 1 or G, Q, T].

    Args:
        scores: float32 [L, Hkv, G or 1, Q, T].
        valid: bool [1, 1, 1, Q, T].
        scaling: factor of the logits.
        how: any but ``"softmax"``, which ranks over a sample of keys.
    """
    return reduce_group(scores, valid, how, Softmax(scaling))


def scored(scorers: Callable[[int], Scorer], steps: Steps) -> Tensor:
    """A method's scores in every layer: float32 [L, Hkv, G or 1, Q, T]."""
    pairs = enumerate(zip(steps.query, steps.key, strict=True))
    return torch.cat([scorers(layer)(query[None], key[None]) for layer, (query, key) in pairs])


def snapkv(steps: Steps, scaling: float) -> Tensor:
    """SnapKV (Li et al., 2024) as a static ranking at the end of the prompt, for each query head: slots as `ranked`.

    Keys after the prompt and in the prompt's window come first; the others rank by the attention of the window's
    queries, summed over these and max-pooled over neighbours.
    """
    q_len, kv_len = steps.query.shape[2], steps.key.shape[2]
    prompt = kv_len - q_len
    watched = Steps(steps.window, steps.window, steps.key[:, :, :prompt])
    seen = attention(watched, scaling).sum(-2)[..., : prompt - WINDOW]
    pooled = F.max_pool1d(seen.flatten(1, 2), KERNEL, stride=1, padding=KERNEL // 2).view_as(seen)
    scores = F.pad(pooled, (0, kv_len - pooled.shape[-1]))[..., None, :].expand(-1, -1, -1, q_len, -1)
    return ranked(scores, valid_of(steps), first=torch.arange(kv_len, device=scores.device) >= prompt - WINDOW)


def sinks_and_recent(steps: Steps) -> Tensor:
    """StreamingLLM's `SINKS` first keys, then the latest (Xiao et al., 2024): slots as `ranked`."""
    valid = valid_of(steps)
    return ranked(scored(lambda layer: Recency(), steps), valid, first=forced_keys(valid, Budget(SINKS, n_sink=SINKS)))


def overlap(full: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """Compound agreement of every head, ``|TopK(full) & TopK(slots)| / K``, averaged over queries: float32 [L, Hq].

    Args:
        full: int64 [L, Hkv, G, Q, N], each head's own slots, best first; N at least ``top_k``.
        slots: int64, as ``full``, or with 1 for G if a group shares its selection.
        top_k: K.
    """
    return found(full, slots, top_k).mean((-1, -2)).flatten(1)


def found(full: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """1 for each of a head's own top-k keys, in their order, that is among ``slots``: float32 [L, Hkv, G, Q, top_k]."""
    width = 1 + max(int(full.max()), int(slots.max()))
    chosen = torch.zeros(*full.shape[:-1], width, dtype=torch.bool, device=full.device)
    chosen.scatter_(-1, slots[..., :top_k].expand(*full.shape[:-1], -1), True)
    return chosen.gather(-1, full[..., :top_k]).float()


def held(weights: Tensor, slots: Tensor, budget: int) -> Tensor:
    """Share of every head's attention on the first ``budget`` of ``slots``, averaged over queries: float32 [L, Hq].

    Args:
        weights: float32 [L, Hkv, G, Q, T], attention weights.
        slots: int64 [L, Hkv, G or 1, Q, N], best first.
        budget: tokens, at most N.
    """
    taken = slots[..., :budget].expand(*weights.shape[:-1], -1)
    return weights.gather(-1, taken).sum(-1).mean(-1).flatten(1)


def with_interval(documents: Sequence[Mapping[Any, Tensor]]) -> dict[Any, dict[str, Any]]:
    """Mean and 95 % interval of every figure by a seeded bootstrap over documents, with the same draws for all figures.

    Args:
        documents: for each document, figures by key: [layers, heads], or a scalar.

    Returns:
        for each key ``mean``, ``low``, ``high``, ``documents``, and ``by_layer`` for figures with layers.
    """
    count = len(documents)
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=DRAWS) / count
    figures = {key: torch.stack([document[key] for document in documents]).cpu() for key in documents[0]}
    table = np.stack([values.reshape(count, -1).double().mean(1).numpy() for values in figures.values()], axis=1)
    low, high = np.quantile(drawn @ table, [0.025, 0.975], axis=0)
    return {
        key: {
            "mean": round(float(table[:, number].mean()), 4),
            "low": round(float(low[number]), 4),
            "high": round(float(high[number]), 4),
            "documents": count,
            **({"by_layer": [round(x, 4) for x in values.mean((0, 2)).tolist()]} if values.dim() == 3 else {}),
        }
        for number, (key, values) in enumerate(figures.items())
    }
