"""Contextual agreement: how many of a head's top keys one chunk's scores alone find (FASA, arXiv 2602.03152)."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.pieces import rows_that_fit
from fasa_flex.core.ranking import INVALID, rank_keys
from fasa_flex.core.shapes import check_heads


@torch.no_grad()
def contextual_agreement(query: Tensor, key: Tensor, layout: RotaryLayout, top_k: int = 256) -> Tensor:
    """Mean share of the full head's top-k keys that are also in each chunk's own top-k.

    ``CA_K(i) = |TopK(q.k) & TopK(q[i].k[i])| / K`` over raw post-RoPE dot products, ties to the lower slot, averaged
    over batch and queries. Queries with fewer than ``top_k`` keys are left out: their agreement is 1 for any chunk.

    Args:
        query: float [B, Hq, Q, D], post-RoPE; causal queries at the last Q positions of the keys.
        key: float [B, Hkv, T, D], post-RoPE; Hq a multiple of Hkv.
        layout: the chunks, with ``layout.head_dim == D``.
        top_k: K.

    Returns:
        float32 [Hq, D // 2].

    Raises:
        ValueError: shapes that do not fit, NaN, or no query with ``top_k`` keys.
    """
    check_heads(query, key)
    q_len, kv_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    if layout.head_dim != head_dim:
        raise ValueError(
            f"the layout is for head_dim {layout.head_dim}, the queries have {head_dim}; pass the model's own."
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_k > kv_len:
        raise ValueError(
            f"top_k = {top_k} exceeds the {kv_len} keys, so agreement says nothing; lower it or use longer text."
        )
    if query.isnan().any() or key.isnan().any():
        raise ValueError("queries or keys hold NaN; check the model's weights and dtype.")
    first = max(0, top_k - 1 - (kv_len - q_len))
    rows = rows_that_fit(8 * query.shape[0] * query.shape[1] * kv_len)
    hits = sum(
        _hits(query[:, :, start : min(start + rows, q_len)], key, kv_len - q_len + start, layout, top_k)
        for start in range(first, q_len, rows)
    )
    assert isinstance(hits, Tensor)
    return (hits / (query.shape[0] * (q_len - first) * top_k)).float()


def _hits(query: Tensor, key: Tensor, first_slot: int, layout: RotaryLayout, top_k: int) -> Tensor:
    """Number of keys in both top-k sets, summed over batch and queries: float64 [Hq, chunks]."""
    batch, query_heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    query = query.reshape(batch, kv_heads, -1, head_dim)
    last = first_slot + torch.arange(q_len, device=query.device)[:, None]
    causal = torch.arange(kv_len, device=query.device) <= last

    def top(dims: Tensor | slice) -> Tensor:
        scores = (query[..., dims] @ key[..., dims].mT).view(batch, query_heads, q_len, kv_len)
        return torch.where(causal, rank_keys(scores), INVALID).topk(top_k, dim=-1).indices

    full = torch.zeros(batch, query_heads, q_len, kv_len, dtype=torch.bool, device=query.device)
    full.scatter_(-1, top(slice(None)), True)
    chunks = layout.chunks.to(query.device)
    hits = [full.gather(-1, top(chunk)).sum(dim=(0, 2, 3), dtype=torch.float64) for chunk in chunks]
    return torch.stack(hits, dim=-1)
