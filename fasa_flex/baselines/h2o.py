"""H2O: keeps the keys with the largest sum of attention weights so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.baselines.evicting import (
    Evicting,
    attention_logits,
    kept_keys,
    rows_that_fit,
    seen,
    softmax_over,
)
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.scoring import Forward


class H2O(Evicting):
    """H2O (Zhang et al., 2023): half of the budget is the keys with most attention so far, half the latest keys.

    Attention weights are summed over all queries, the prefill's included; later queries' weights are over the kept
    keys. Each step drops the key of smallest sum that is not among the latest. Weights are averaged over a group's
    query heads; the published code keeps a cache for each query head.
    """

    def begin(self, forward: Forward) -> None:
        """As `Evicting`."""
        self._received = torch.zeros(*forward.key.shape[:2], 0, dtype=torch.float32, device=forward.key.device)

    def observe(self, query: Tensor, slots: Tensor, key: Tensor, scaling: float) -> None:
        """As `Evicting`."""
        keys, index = kept_keys(key, self.kept), self.kept.clamp(min=0)
        self._received = F.pad(self._received, (0, key.shape[2] - self._received.shape[2]))
        step = rows_that_fit(query.shape[0] * query.shape[1] * index.shape[-1])
        for at in range(0, query.shape[2], step):
            logits = attention_logits(query[:, :, at : at + step], keys, scaling)
            weights = softmax_over(logits, seen(self.kept, slots[:, at : at + step]))
            self._received.scatter_add_(-1, index, weights.mean(2).sum(2))

    def recent(self, allowed: Tensor) -> Tensor:
        """As `Evicting`: half of the budget, less the query's own key."""
        return (allowed // 2).clamp(min=1) - 1

    def rank(self, key: Tensor, recent: Tensor, scaling: float) -> Tensor:
        """As `Evicting`."""
        return self._received.gather(-1, self.kept.clamp(min=0))

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """The kept keys and values; ranking sums attention weights, which attention computes anyway."""
        return ReadShare(ranking=0.0, together=True)
