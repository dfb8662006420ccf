"""The methods that evict, in plain loops over one key/value head, and what a test hands to a scorer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.scoring import Forward, SequenceScorer
from fasa_flex.core.selection import select, valid_keys


def states(
    rows: int, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Queries of standard deviation ``spread``, and keys."""
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(rows, heads, length, dim, generator=generator)
    return query, torch.randn(rows, kv_heads, length, dim, generator=generator)


def forward_of(
    query: Tensor,
    key: Tensor,
    budget: Budget,
    dense: int | list[int] = 0,
    key_mask: Tensor | None = None,
    first_slot: int | None = None,
) -> Forward:
    """As `enable` shows it: queries behind slot ``dense`` (of each row) with more keys than the budget are sparse."""
    q_len, kv_len = query.shape[2], key.shape[2]
    first_slot = kv_len - q_len if first_slot is None else first_slot
    valid = valid_keys(q_len, first_slot + q_len, key_mask, query.device)
    valid = torch.nn.functional.pad(valid, (0, kv_len - first_slot - q_len))
    n_valid = valid.sum(-1)[:, 0, 0].expand(len(query), -1)
    slots = first_slot + torch.arange(q_len)
    sparse = budget.exceeded(n_valid) & (slots >= torch.tensor(dense).view(-1, 1))
    first = max(0, min(q_len, int(torch.tensor(dense).min()) - first_slot))
    return Forward(query, key, valid, sparse, first, first_slot, budget, query.shape[3] ** -0.5)


def selected(scorer: SequenceScorer, forward: Forward) -> Tensor:
    """The keys that queries from ``forward.first`` on attend to: bool [B, Hkv, G or 1, Q - first, T]."""
    scores = scorer.follow(forward)
    assert scores.dtype == torch.float32
    return select(scores, forward.valid[:, :, :, forward.first :], forward.budget).mask


def weights(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(x - largest) for x in logits]
    return [power / sum(powers) for power in powers]


def attention(query: np.ndarray, key: np.ndarray, seen: list[int]) -> dict[int, float]:
    logits = [float(query @ key[s]) / math.sqrt(key.shape[1]) for s in seen]
    return dict(zip(seen, weights(logits), strict=True))


Rule = Callable[[np.ndarray, np.ndarray, list[int], int, int], dict[int, float]]
"""From queries [G, T, D], keys [T, D], kept slots, own slot and budget: scores of kept slots that are not recent."""


def kept_by(rule: Rule, query: np.ndarray, key: np.ndarray, dense: int, budget: int) -> dict[int, set[int]]:
    """What each sparse query attends to: room for its own key is made before it."""
    kept: list[int] = []
    found = {}
    for slot in range(len(key)):
        if slot >= dense and len(kept) + 1 > budget:
            scores = rule(query, key, kept, slot, budget)
            recent = [s for s in reversed(kept) if s not in scores]
            best = sorted(scores, key=lambda s: (-scores[s], s))
            kept = sorted((recent + best)[: budget - 1])
        kept = [*kept, slot]
        if slot >= dense and slot + 1 > budget:
            found[slot] = set(kept)
    return found


def _pooled(votes: list[float], kernel: int) -> list[float]:
    half = kernel // 2
    return [max(votes[max(0, i - half) : i + half + 1]) for i in range(len(votes))]


def snapkv(window: int = 32, kernel: int = 7) -> Rule:
    """SnapKVCluster.update_kv: softmax over all keys, summed over the window, pooled over the keys in front of it."""

    def rule(query: np.ndarray, key: np.ndarray, kept: list[int], slot: int, budget: int) -> dict[int, float]:
        size = min(window, max(1, budget // 2))
        observers = list(range(max(0, slot - size), slot))
        votes = dict.fromkeys(kept, 0.0)
        for head in query:
            for w in observers:
                seen = [s for s in kept if s <= w]
                for s, weight in attention(head[w], key, seen).items():
                    votes[s] += weight / len(query)
        others = kept[: max(0, len(kept) - size)]
        return dict(zip(others, _pooled([votes[s] for s in others], kernel), strict=True))

    return rule


def rkv(window: int = 8, kernel: int = 7, mix: float = 0.1, threshold: float = 0.5) -> Rule:
    """R1KV.update_kv with cal_similarity(retain_direction="last")."""

    def rule(query: np.ndarray, key: np.ndarray, kept: list[int], slot: int, budget: int) -> dict[int, float]:
        size = min(window, max(1, budget // 2))
        observers = list(range(max(0, slot - size), slot))
        others = kept[: max(0, len(kept) - size)]
        importance = [0.0] * len(others)
        for w in observers:
            logits = [max(float(head[w] @ key[s]) / math.sqrt(key.shape[1]) for head in query) for s in others]
            for i, weight in enumerate(weights(logits) if logits else []):
                importance[i] += weight / len(observers)
        n = len(kept)
        cosine = np.zeros((n, n))
        for i, a in enumerate(kept):
            for j, b in enumerate(kept):
                if i != j:
                    cosine[i, j] = key[a] @ key[b] / (np.linalg.norm(key[a]) * np.linalg.norm(key[b]))
        for i in range(n):
            cosine[i, max([j for j in range(n) if cosine[i, j] > threshold], default=0)] = 0.0
        redundancy = weights([float(cosine[:, j].mean()) for j in range(n)])
        scores = [mix * i - (1 - mix) * r for i, r in zip(_pooled(importance, kernel), redundancy, strict=False)]
        return dict(zip(others, scores, strict=True))

    return rule


def h2o() -> Rule:
    """H2OKVCache_LayerWise with hh_size + recent_size = budget - 1 between steps."""
    received: dict[int, float] = {}
    held: dict[int, list[int]] = {}

    def rule(query: np.ndarray, key: np.ndarray, kept: list[int], slot: int, budget: int) -> dict[int, float]:
        for past in range(slot):
            if past in held:
                continue
            held[past] = [s for s in kept if s <= past]  # all of them in the prefill
            for head in query:
                for s, weight in attention(head[past], key, held[past]).items():
                    received[s] = received.get(s, 0.0) + weight / len(query)
        recent = max(1, budget // 2) - 1
        return {s: received[s] for s in kept[: len(kept) - recent]}

    return rule
