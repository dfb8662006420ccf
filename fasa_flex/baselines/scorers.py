"""The scorers of the baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys, dot_products


@dataclass(frozen=True)
class AllDimensions:
    """The oracle: the full dot product, so the selection is the true top of the attention weights."""

    estimates_logits = True

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        batch, query_heads, q_len, head_dim = query.shape
        kv_heads, kv_len = key.shape[1:3]
        grouped = query.reshape(batch, kv_heads, -1, head_dim)
        return dot_products(grouped, key).view(batch, kv_heads, query_heads // kv_heads, q_len, kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """Every key to rank, then the values alone."""
        return ReadShare(ranking=0.5, rows=0.5)


@dataclass(frozen=True)
class Recency:
    """The latest keys first: with forced sinks this is StreamingLLM's window (Xiao et al., 2024), nothing evicted."""

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        batch, kv_heads, kv_len, _ = key.shape
        slots = torch.arange(kv_len, dtype=torch.float32, device=key.device)
        return slots.expand(batch, kv_heads, 1, query.shape[2], kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """Nothing to rank."""
        return ReadShare(ranking=0.0, together=True)
