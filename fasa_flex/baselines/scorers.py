"""Stateless scorers of baselines: the exact dot product, and recency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys, dot_products
from fasa_flex.core.scoring import Scorer


def group_scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products of queries [B, Hq, Q, D] with their group's keys [B, Hkv, T, D]: float32 [B, Hkv, G, Q, T]."""
    (batch, query_heads, q_len, dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
    products = dot_products(query.reshape(batch, kv_heads, -1, dim), key)
    return products.view(batch, kv_heads, query_heads // kv_heads, q_len, kv_len)


@dataclass(frozen=True)
class AllDimensions(Scorer):
    """The oracle: ranks by the full dot product, so it selects the largest attention weights."""

    estimates_logits = True

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        return group_scores(query, key)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """All keys to rank, then only the selected values."""
        return ReadShare(ranking=0.5, rows=0.5)


@dataclass(frozen=True)
class Recency(Scorer):
    """Ranks later keys higher; with forced sinks this is StreamingLLM (Xiao et al., 2024), without eviction."""

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        batch, kv_heads, kv_len, _ = key.shape
        slots = torch.arange(kv_len, dtype=torch.float32, device=key.device)
        return slots.expand(batch, kv_heads, 1, query.shape[2], kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """No bytes to rank."""
        return ReadShare(ranking=0.0, together=True)
