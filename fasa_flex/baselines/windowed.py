"""SnapKV and R-KV: keys stay by the attention of the last queries, the observation window."""

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
    """Methods that remember the queries of an observation window, whose keys they keep.

    The window is of ``window`` queries, or half of a budget that is too small for it, and at least of one.
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
        """The kept keys and values to attend, and the keys once more to rank them; the dropped ones never again.

        What is read once, where the prefill ends and all but the budget is dropped, is not counted.
        """
        return ReadShare(ranking=0.0, rows=1.5, together=True)

    def _pooled(self, votes: Tensor, others: Tensor) -> Tensor:
        """Max-pooled ``votes`` [B, Hkv, K] of the ``others`` than the window's keys, neighbours among these."""
        return max_pool(torch.where(others, votes, -torch.inf), self.kernel)

    def _others(self, recent: Tensor) -> Tensor:
        """The kept keys before the window: bool [B, Hkv, K]."""
        width = self.kept.shape[-1]
        column = torch.arange(width, device=recent.device)
        return (column < width - recent[..., None]) & (self.kept != ABSENT)


class SnapKV(_Windowed):
    """SnapKV (Li et al., 2024): what the prompt's last queries attend to, and its neighbours.

    At the end of the prefill the attention weights of the last 32 prompt queries are summed for every earlier key and
    max-pooled over 7 neighbours; the best stay, and the window's own keys. Generated keys are kept. As soon as there
    are more than the budget, which is at once where the prompt exceeds it, the same is done with the last 32 queries
    over what is kept; the paper lets the cache grow instead. Weights are averaged over a group's query heads, where the
    published code keeps a cache for each.

    Args:
        window: queries that observe, half of a budget below twice as many.
        kernel: neighbours that are pooled.
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
    """R-KV (Cai et al., 2025): important to the last queries, and not said again by a later key.

    ``score = mix * importance - (1 - mix) * redundancy``. Importance: attention weights of the last 8 queries over the
    keys before them, the largest logit of a group's query heads taken first, averaged over the queries and max-pooled
    over 7 neighbours. Redundancy: softmax of a key's mean cosine similarity to the others, in which every key spares
    the latest one that it resembles by more than ``threshold`` (the first kept one where it resembles none: so does the
    published code). The paper drops keys 128 at a time; here each query makes room, and no budget is exceeded.

    Args:
        window: queries that observe, half of a budget below twice as many.
        kernel: neighbours that are pooled.
        mix: the paper's lambda.
        threshold: of cosine similarity.
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
    """R-KV's redundancy of ``keys`` [B, Hkv, K, D], of those ``present`` bool [B, Hkv, K]: float32 [B, Hkv, K]."""
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
