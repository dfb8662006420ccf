"""SnapKV and R-KV: keep keys by the attention of the last queries, the observation window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.baselines.evicting import (
    ABSENT,
    Evicting,
    Window,
    attention_logits,
    kept_keys,
    max_pool,
    rows_that_fit,
    seen,
    softmax_over,
)
from fasa_flex.core.budget import check_count
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.scoring import Forward


class _Windowed(Evicting):
    """Methods with an observation window of queries, whose own keys are always kept.

    The window has ``window`` queries, at most half of the budget and at least one.
    """

    def __init__(self, window: int, kernel: int) -> None:
        super().__init__()
        check_count("window", window, 1)
        check_count("kernel", kernel, 1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that a key lies in the middle of its neighbours, got {kernel}.")
        self.kernel = kernel
        self.window = Window(window)

    def begin(self, forward: Forward) -> None:
        """As `Evicting`."""
        self.window.begin(forward.query)

    def observe(self, query: Tensor, slots: Tensor, key: Tensor, scaling: float) -> None:
        """As `Evicting`."""
        self.window.add(query, slots)

    def recent(self, allowed: Tensor) -> Tensor:
        """As `Evicting`: the window's own keys."""
        return (allowed // 2).clamp(1, self.window.size)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """The kept keys and values, and the keys once more to rank them; no dropped ones.

        Not counted: the single read of all keys at the end of the prefill, when most are dropped.
        """
        return ReadShare(ranking=0.0, rows=1.5, together=True)

    def _pooled(self, votes: Tensor, others: Tensor) -> Tensor:
        """Max-pooled ``votes`` [B, Hkv, K] of the ``others``, the keys before the window; neighbours among these."""
        return max_pool(torch.where(others, votes, -torch.inf), self.kernel)

    def _others(self, recent: Tensor) -> Tensor:
        """The kept keys before the window: bool [B, Hkv, K]."""
        width = self.kept.shape[-1]
        column = torch.arange(width, device=recent.device)
        return (column < width - recent[..., None]) & (self.kept != ABSENT)


class SnapKV(_Windowed):
    """SnapKV (Li et al., 2024): keeps the keys to which the prompt's last queries attend, and their neighbours.

    At the end of the prefill the attention weights of the last 32 prompt queries are summed for every earlier key and
    max-pooled over 7 neighbours; the best keys and the window's own keys stay. Generated keys are kept. Whenever there
    are more keys than the budget, for a long prompt at every step, the same is repeated with the last 32 queries over
    the kept keys; the paper lets the cache grow instead. Weights are averaged over a group's query heads; the published
    code keeps a cache for each query head.

    Args:
        window: queries of the observation window; at most half of the budget is used.
        kernel: neighbours of the max-pooling, odd.

    Raises:
        ValueError: ``window`` or ``kernel`` out of range.
    """

    def __init__(self, window: int = 32, kernel: int = 7) -> None:
        super().__init__(window, kernel)

    def rank(self, key: Tensor, recent: Tensor, scaling: float) -> Tensor:
        """As `Evicting`."""
        logits = attention_logits(self.window.query, kept_keys(key, self.kept), scaling)
        weights = softmax_over(logits, seen(self.kept, self.window.slots)).mean(2)
        votes = (weights * self.window.sees(recent)[..., None]).sum(2)
        return self._pooled(votes, self._others(recent))


class RKV(_Windowed):
    """R-KV (Cai et al., 2025): keeps keys that are important to the last queries and unlike later keys.

    ``score = mix * importance - (1 - mix) * redundancy``. Importance: attention weights of the last 8 queries over the
    keys before them, from the largest logit of a group's query heads, averaged over the queries and max-pooled over 7
    neighbours. Redundancy: softmax over keys of the mean cosine similarity to the others; each key adds nothing to the
    latest key that it resembles by more than ``threshold`` (to the first kept key if it resembles none, as in the
    published code). The paper drops 128 keys at a time; here every query drops keys, so the budget is never exceeded.

    Args:
        window: queries of the observation window; at most half of the budget is used.
        kernel: neighbours of the max-pooling, odd.
        mix: the paper's lambda, in [0, 1].
        threshold: least cosine similarity of keys that resemble each other.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, window: int = 8, kernel: int = 7, mix: float = 0.1, threshold: float = 0.5) -> None:
        super().__init__(window, kernel)
        if not 0.0 <= mix <= 1.0:
            raise ValueError(f"mix weighs importance against redundancy and must lie in [0, 1], got {mix}.")
        self.mix, self.threshold = mix, threshold

    def rank(self, key: Tensor, recent: Tensor, scaling: float) -> Tensor:
        """As `Evicting`."""
        keys, others = kept_keys(key, self.kept), self._others(recent)
        logits = attention_logits(self.window.query, keys, scaling).amax(2)
        observers = self.window.sees(recent)
        weights = softmax_over(logits, others[:, :, None]) * observers[..., None]
        importance = weights.sum(2) / observers.sum(-1, keepdim=True)
        redundancy = _redundancy(keys, self.kept != ABSENT, self.threshold)
        return self.mix * self._pooled(importance, others) - (1 - self.mix) * redundancy


def _redundancy(keys: Tensor, present: Tensor, threshold: float) -> Tensor:
    """R-KV's redundancy of the ``present`` bool [B, Hkv, K] among ``keys`` [B, Hkv, K, D]: float32 [B, Hkv, K]."""
    unit = F.normalize(keys.float(), dim=-1, eps=1e-8) * present[..., None]
    batch, heads, width, _ = unit.shape
    column = torch.arange(width, dtype=torch.int32, device=keys.device)
    count = present.sum(-1, keepdim=True, dtype=torch.int32).clamp(min=1)
    total = torch.zeros(batch, heads, width, dtype=torch.float32, device=keys.device)
    step = rows_that_fit(batch * heads * width)
    for at in range(0, width, step):
        cosine = dot_products(unit[:, :, at : at + step], unit)
        cosine.diagonal(at, dim1=-2, dim2=-1).zero_()
        latest = torch.where(cosine > threshold, column, width - count[..., None]).amax(-1, keepdim=True)
        total += cosine.scatter_(-1, latest.long(), 0.0).sum(-2)
    return torch.where(present, total / count, -torch.inf).softmax(-1)
