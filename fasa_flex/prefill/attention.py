"""Attention by blocks: exact attention of every block of queries to its selected blocks of keys.

`flex_attention` computes it with a `BlockMask` of full blocks and, on the diagonal, partial ones; Inductor's kernel
then reads the listed blocks alone. Without a GPU, or with gradients, the keys and values of each block of queries are
gathered instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fasa_flex.backends.gather import dot_rows, take_rows
from fasa_flex.backends.specialization import specialized
from fasa_flex.core.config import Backend
from fasa_flex.core.softmax import Softmax, with_sinks
from fasa_flex.prefill.estimators import BlockEstimator, Blocks
from fasa_flex.prefill.grid import BLOCK, Grid, take
from fasa_flex.prefill.selection import BlockBudget, BlockLists, select_blocks


def block_sparse_attention(
    blocks: Blocks,
    value: Tensor,
    budget: BlockBudget,
    estimator: BlockEstimator,
    backend: Backend = "auto",
    completes: bool = False,
) -> tuple[Tensor, BlockLists]:
    """Estimate, select and attend: sparse attention of a prefill.

    Args:
        blocks: queries and keys in the blocks of a grid.
        value: float [B, Hkv, T, Dv].
        budget: number of blocks of keys of each block of queries.
        estimator: estimates the attention between blocks.
        backend: ``"flex"``, ``"gather"``, or ``"auto"``: flex on CUDA if it can serve the call, otherwise gather.
        completes: whether the mean key and value of each block that is left out stand for its 128 tokens.

    Returns:
        [B, Hq, Q, Dv], zeros for queries outside the grid; and the selected blocks.

    Raises:
        ValueError: the estimator returned another shape, or flex is asked for and cannot serve the call.
    """
    lists = select_blocks(_checked(estimator(blocks), blocks), blocks.grid, budget)
    return attend_to_blocks(blocks, lists, value, backend, completes), lists


def _checked(mass: object, blocks: Blocks) -> Tensor:
    """The estimates of each selecting head, [B, Hq or H, M, N]."""
    grid, (batch, heads) = blocks.grid, blocks.query.shape[:2]
    sets = len(blocks.scorer.dims)
    shapes = [(batch, sets, group, grid.n_queries, grid.n_keys) for group in (heads // sets, 1)]
    got = tuple(mass.shape) if isinstance(mass, Tensor) else type(mass).__name__
    if got not in shapes:
        raise ValueError(f"an estimator must return {shapes[0]}, or 1 in the third place, got {got}.")
    assert isinstance(mass, Tensor)
    return mass.flatten(1, 2)


def attend_to_blocks(
    blocks: Blocks, lists: BlockLists, value: Tensor, backend: Backend = "auto", completes: bool = False
) -> Tensor:
    """Compute exact attention to the selected blocks, [B, Hq, Q, Dv]; zeros for queries outside the grid.

    If it ``completes``, 128 tokens with the mean key and value of a block stand for each block that is left out.
    """
    grid, query, key, softmax = blocks.grid, blocks.query, blocks.key, blocks.softmax
    reason = _why_no_flex(query, key, value, softmax)
    if backend == "flex" and reason is not None:
        raise ValueError(f"backend 'flex' cannot attend by blocks: {reason}; use backend='auto'.")
    by_flex = backend == "flex" or (backend != "gather" and reason is None and query.is_cuda)
    if not grid.is_packed:
        key, value = take(key, grid.slots), take(value, grid.slots)
    elif key.shape[2] > (end := grid.n_keys * BLOCK):
        key, value = key[:, :, :end], value[:, :, :end]
    ordered = grid.in_order and query.shape[2] >= BLOCK  # a shorter one would take flex's kernel for decoding
    rows = query if ordered else take(query, grid.queries)
    means = _Means.of(key, value, lists, grid) if completes else None
    out = (_by_flex if by_flex else _by_gather)(rows, key, value, lists, grid, softmax, means)
    if ordered:
        return out
    return torch.where((grid.places >= 0)[:, None, :, None], take(out, grid.places.clamp(min=0)), 0.0)


def _why_no_flex(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> str | None:
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        return "it computes no gradients (torch.no_grad() asks for none)"
    if not query.is_cuda and softmax.sinks is not None:
        return "it has no learned sinks on CPU"
    return None


class _Means(NamedTuple):
    """The mean key and value of each whole block, and the blocks of queries that read it in the block's place.

    Attributes:
        key: float [B, Hkv, N, D].
        value: float [B, Hkv, N, Dv].
        read: bool [B, H, M, N], the blocks before the diagonal that are not selected.
    """

    key: Tensor
    value: Tensor
    read: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, lists: BlockLists, grid: Grid) -> _Means:
        whole = key.shape[2] // BLOCK
        mean_key, mean_value = (
            states[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).mean(3) for states in (key, value)
        )
        number = torch.arange(whole, device=key.device)
        before = (number < lists.diagonal[..., None])[:, None].expand(*lists.count.shape, whole)
        return cls(mean_key, mean_value, before & ~lists.chosen(grid.n_keys)[..., :whole])


def _by_gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    grid: Grid,
    softmax: Softmax,
    means: _Means | None,
) -> Tensor:
    """Attend block by block of queries, to gathered keys and values; queries are in the places of the grid."""
    (batch, query_heads), (kv_heads, kv_len), heads = query.shape[:2], key.shape[1:3], lists.count.shape[1]
    within, device, outs = torch.arange(BLOCK, device=query.device), query.device, []
    for m in range(grid.n_queries):
        width, rows = int(lists.count[:, :, m].max()), query[:, :, m * BLOCK : (m + 1) * BLOCK]
        diagonal = lists.diagonal[:, None, m, None].expand(batch, heads, 1)
        chosen = torch.cat([lists.listed[:, :, m, :width], diagonal], dim=-1).long()
        taken = torch.arange(width + 1, device=device) < lists.count[:, :, m, None]
        taken[..., width] = True
        slots = (BLOCK * chosen[..., None] + within).flatten(2)  # [B, H, W]
        token = (BLOCK * (grid.first + m))[:, None] + within[: rows.shape[2]]  # [R, 128]
        visible = taken.repeat_interleave(BLOCK, dim=-1)[:, :, None] & (slots[:, :, None] <= token[:, None, :, None])
        index = slots.clamp(max=kv_len - 1).view(batch, kv_heads, -1, 1, slots.shape[2])
        keys, values = take_rows(key, index), take_rows(value, index)
        members = query_heads // heads
        grouped = rows.unflatten(1, (heads, members)).flatten(2, 3)
        mask = visible.repeat(1, 1, members, 1)
        if means is not None:
            keys, values, mask = _with_means(means, m, keys, values, mask)
        if softmax.plain:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=softmax.scaling)
        else:
            logits = softmax.logits(dot_rows(grouped, keys))
            logits = logits.masked_fill(~mask, -torch.inf) if means is None else logits + mask
            out = (logits.softmax(-1).to(values.dtype)) @ values
        out = out.unflatten(2, (members, -1)).flatten(1, 2)
        if softmax.sinks is not None:
            lse = logits.logsumexp(-1).unflatten(2, (members, -1)).flatten(1, 2)
            out = with_sinks(out, lse, None, softmax.sinks)
        outs.append(out)
    return torch.cat(outs, dim=2)


def _with_means(means: _Means, m: int, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append the means that block ``m`` of the queries reads to its keys and values [B, H, W, D]; the mask is added."""
    heads = keys.shape[1] // means.key.shape[1]
    mean_key, mean_value = (states.repeat_interleave(heads, dim=1) for states in means[:2])
    bias = torch.where(mask, 0.0, -torch.inf)
    more = torch.where(means.read[:, :, m, None], math.log(BLOCK), -torch.inf).expand(-1, -1, mask.shape[2], -1)
    mask = torch.cat([bias, more], dim=3).to(keys.dtype)
    return torch.cat([keys, mean_key], dim=2), torch.cat([values, mean_value], dim=2), mask


def _by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    grid: Grid,
    softmax: Softmax,
    means: _Means | None,
) -> Tensor:
    """Run the compiled `flex_blocks`; queries are in the places of the grid."""
    batch, query_heads = query.shape[:2]

    def by_head(states: Tensor) -> Tensor:  # flex takes one list for each query head, contiguous
        heads = query_heads // states.shape[1]
        return states.repeat_interleave(heads, dim=1) if heads > 1 else states

    count, listed = by_head(lists.count).contiguous(), by_head(lists.listed)
    diagonal = lists.diagonal.unsqueeze(1).unsqueeze(3).expand(batch, query_heads, -1, 1)
    start = (BLOCK * grid.first).int().expand(batch).contiguous()
    partial, n_partial, read, begin, n_keys = diagonal, torch.ones_like(count), None, None, grid.n_keys
    if means is not None:  # blocks of means follow the blocks of keys
        blocks = -(-means.key.shape[2] // BLOCK)
        room = (0, 0, 0, n_keys * BLOCK - key.shape[2])
        more = (0, 0, 0, blocks * BLOCK - means.key.shape[2])
        key = torch.cat([F.pad(key, room), F.pad(means.key, more)], dim=2)
        value = torch.cat([F.pad(value, room), F.pad(means.value, more)], dim=2)
        read = by_head(F.pad(means.read, (0, more[3]))).contiguous()
        begin = torch.full((batch,), n_keys * BLOCK, dtype=torch.int32, device=key.device)
        behind = torch.arange(n_keys, n_keys + blocks, dtype=torch.int32, device=key.device)
        partial = torch.cat([diagonal, behind.expand(*diagonal.shape[:3], -1)], dim=3)
        n_partial = n_partial + (lists.diagonal[:, None].expand_as(count) + BLOCK - 1) // BLOCK
        n_keys += blocks
    # both lists are equally wide: a GPU's kernel finds full blocks by the strides of the partial ones (torch 2.11), and
    # the CPU's needs an entry for each block of keys
    width = max(listed.shape[3], partial.shape[3]) if query.is_cuda else n_keys
    listed, partial = (F.pad(each, (0, width - each.shape[3])).contiguous() for each in (listed, partial))
    masked = (n_partial.contiguous(), partial, count, listed, start, read, begin)
    # Inductor's C++ for two dynamic lengths does not compile (torch 2.13)
    lengths = (min(grid.n_queries, 2),) if query.is_cuda else (query.shape[2], key.shape[2])
    sizes = (batch, query_heads, key.shape[1], query.shape[3], value.shape[3], *lengths)
    kind = (query.dtype, query.device.type, softmax.softcap, softmax.scaling, softmax.sinks is None, means is None)
    modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
    out, lse = _compiled(*sizes, *kind, *modes)(query, key, value, *masked, softmax)
    return out if softmax.sinks is None else with_sinks(out, lse, None, softmax.sinks)


@functools.cache
def _compiled(*signature: object) -> Callable[..., Any]:
    return specialized(flex_blocks, signature)


def flex_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial_count: Tensor,
    partial: Tensor,
    full_count: Tensor,
    full: Tensor,
    start: Tensor,
    read: Tensor | None,
    begin: Tensor | None,
    softmax: Softmax,
) -> tuple[Tensor, Tensor | None]:
    """Run `flex_attention` with lists of partial and of full blocks; compile it, as eager code computes every score.

    Args:
        query: float [B, Hq, M * 128, D], row i of batch row b is token ``start[b] + i``.
        key: float [B, Hkv, T, D], key i is token i.
        value: float [B, Hkv, T, Dv].
        partial_count: int32 [B, Hq, M], 1.
        partial: int32 [B, Hq, M, K], the blocks on the diagonal, padded to the strides of ``full``.
        full_count: int32 [B, Hq, M], number of blocks before the diagonal.
        full: int32 [B, Hq, M, K], their numbers.
        start: int32 [B], token of the first query.
        read: bool [B, Hq, M, N], the means that each block of queries reads; None: none.
        begin: int32 [B], row of ``key`` from which on it holds means, each of 128 keys; None: there are none.
        softmax: scaling and logit cap; for learned sinks the log-sum-exp is returned, too.

    Returns:
        [B, Hq, M * 128, Dv], and the log-sum-exp of the logits, float32 [B, Hq, M * 128], or None.
    """

    def visible(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        causal: Tensor = slot <= start[b] + row
        if read is None or begin is None:
            return causal
        is_mean = slot >= begin[b]
        return torch.where(is_mean, read[b, h, row // BLOCK, torch.where(is_mean, slot - begin[b], 0)], causal)

    def logit(score: Tensor, b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        capped = score if softmax.softcap is None else softmax.cap(score)
        return capped if begin is None else capped + torch.where(slot >= begin[b], math.log(BLOCK), 0.0)

    block_mask = BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    out: Any = flex_attention(
        query,
        key,
        value,
        score_mod=None if softmax.softcap is None and begin is None else logit,
        block_mask=block_mask,
        scale=softmax.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if softmax.sinks is None else AuxRequest(lse=True),
    )
    if isinstance(out, tuple):
        return out[0], out[1].lse
    return out, None
