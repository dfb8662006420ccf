"""Sparse attention in a forward of several queries, some of which may be dense."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.config import Backend
from fasa_flex.core.method import Call
from fasa_flex.core.pieces import rows_that_fit
from fasa_flex.core.scoring import Given
from fasa_flex.hf.attention_call import AttentionResult


def in_parts(call: Call, backend: Backend) -> Tensor:
    """Compute sparse attention of several queries, [B, Q, Hq, D], in parts whose float32 scores fit in 64 MiB."""
    (batch, query_heads, q_len, _), kv_len = call.query.shape, call.key.shape[2]
    step = rows_that_fit(4 * batch * query_heads * kv_len)
    scores = call.scorer.scores if isinstance(call.scorer, Given) else None
    parts = []
    for at in range(0, q_len, step):
        part = replace(call, query=call.query[:, :, at : at + step], valid=call.valid[:, :, :, at : at + step])
        if scores is not None:
            part.scorer = Given(scores[..., at : at + step, :])
        parts.append(sparse_attention(part, backend))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2).contiguous()


def weights_of(call: Call) -> Tensor:
    """Compute attention weights [B, Hq, Q, T] of sparse queries for ``output_attentions``, from one-hot values."""
    key = call.key.to(call.query.device)
    ones = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    alone = replace(call, key=key, value=ones, packed_keys=None, resident=None, marks=None, completion=None)
    return sparse_attention(alone, "gather")


def merged(
    dense: AttentionResult, focused: Tensor, weights: Tensor | None, sparse: Tensor, first: int
) -> AttentionResult:
    """Merge dense attention of the queries before a boundary with sparse attention and weights of the others."""
    out, dense_weights = dense
    merged = torch.where(sparse[:, first:, None, None], focused, out[:, first:])
    out = torch.cat([out[:, :first], merged], dim=1)
    if weights is None or dense_weights is None:
        return out, dense_weights
    merged = torch.where(sparse[:, None, first:, None], weights, dense_weights[:, :, first:])
    return out, torch.cat([dense_weights[:, :, :first], merged], dim=2)
