"""A decode step on a GPU as operators over the kernels of `fasa_flex.kernels`: a sparse layer's and a dense one's."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.kernels import (
    TILE,
    attend_part,
    attend_rows,
    fetch_rows,
    find_rows,
    merge_parts,
    mix_group,
    on_their_device,
    overlapping,
    parts_of,
    power_of_two,
    score_keys,
    select_keys,
)
from fasa_flex.operators import operator

SCORE_BLOCK, MIXED_BLOCK, SCORE_WARPS = 128, 256, 4  # mixed: where every block adds to a softmax over all
MIX_BLOCK, MIX_WARPS = 1024, 8
SELECT_WARPS, MOST_COUNTED = 8, 2048
ATTEND_BLOCK, ATTEND_WARPS = 128, 4
FIND_WARPS, FETCH_BLOCK, FETCH_WARPS, FETCH_PROGRAMS = 8, 16, 4, 64
"""Keys and warps of a program, the fastest of those tried on an H100; more tiles than counted are guessed at too.

More programs than 64 fetch scattered rows of the host more slowly.
"""

PROGRAMS, MOST_PARTS, MERGE_WARPS = 256, 128, 8
"""Of a dense layer's attention: two programs for each multiprocessor, whose parts of a row are merged at once."""


@operator("select_slots")
@on_their_device
def select_slots(
    query: Tensor,
    dims: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    n_fac: int,
    how: str,
    scaling: float,
) -> Tensor:
    """TIP and the selection for one query a row.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        dims: int64 [Hkv, 2 * n_tip], contiguous, the dominant dimensions.
        packed: [B, Hkv, C, 2 * n_tip], contiguous, C >= T; a float dtype or int8.
        scales: float16 [B, Hkv, C] of int8 keys.
        codes: uint8 [B or 1, T], rows contiguous: 0 for an invalid key, 1 for a valid one, 2 for one that is forced in.
        n_fac: tokens; K tiles of 16 keys are searched in registers, so a few hundred.
        how: "softmax", "mean" or "max", over the group.
        scaling: of the softmax.

    Returns:
        int32 [B * Hkv, min(n_fac, T)], ascending; -1 where no valid key is left.
    """
    batch, query_heads, _, dim = query.shape
    kv_heads, width = dims.shape
    kv_len, group, rows = codes.shape[1], query_heads // kv_heads, batch * kv_heads
    wanted, mixed = min(n_fac, kv_len), how == "softmax" and group > 1
    group_pad, block = power_of_two(group, 16), MIXED_BLOCK if mixed else SCORE_BLOCK
    whole = MIX_BLOCK if mixed else 16 * TILE.value  # keys: of sixteens of tiles, which threads read in fours
    covered = parts_of(kv_len, whole) * whole
    blocks, tiles = covered // block, parts_of(kv_len, TILE.value)
    order, maxima = _integers(query, rows, covered), _integers(query, rows, covered // TILE.value)
    scores, top, total = (
        torch.empty(rows, group, size if mixed else 0, device=query.device) for size in (kv_len, blocks, blocks)
    )
    code_stride = 0 if codes.shape[0] == 1 else codes.stride(0)
    overlap, launch = overlapping(query.device)
    score_keys[(blocks, rows)](
        query, dims, packed, codes if scales is None else scales, codes, scores, top, total, order, maxima,
        order.stride(0), maxima.stride(0), kv_len, code_stride, packed.stride(1), blocks, scaling, group, group_pad,
        dim, width, power_of_two(width, 16), block, scales is not None,
        how if mixed or how == "mean" else "max", kv_heads, overlap, num_warps=SCORE_WARPS, **launch,
    )  # fmt: skip
    if mixed:
        mix_group[(covered // MIX_BLOCK, rows)](
            scores, top, total, codes, order, maxima, order.stride(0), maxima.stride(0), kv_len, code_stride, blocks,
            group, power_of_two(group), MIX_BLOCK, kv_heads, overlap, num_warps=MIX_WARPS, **launch,
        )  # fmt: skip
    wanted_pad = power_of_two(wanted, 16)
    slots, chosen = _integers(query, rows, wanted), _integers(query, rows, wanted_pad)
    select_keys[(rows,)](
        order, maxima, chosen, slots, order.stride(0), maxima.stride(0), wanted,
        power_of_two(tiles, 2), wanted_pad, tiles > wanted_pad, tiles > MOST_COUNTED, overlap,
        num_warps=SELECT_WARPS, **launch,
    )  # fmt: skip
    return slots


@torch.library.register_fake("fasa_flex::select_slots")
def _(
    query: Tensor,
    dims: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    n_fac: int,
    how: str,
    scaling: float,
) -> Tensor:
    return _integers(query, query.shape[0] * dims.shape[0], min(n_fac, codes.shape[1]))


@operator("attend_slots")
@on_their_device
def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """FAC for one query a row.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        key: float [B, Hkv, T, D], each row contiguous; on the device, or pinned host memory (FASA-M), of which the
            kernel reads the selected rows.
        value: likewise, [B, Hkv, T, Dv].
        slots: int32 [B * Hkv, K], rows of ``key`` and ``value``; -1 for none.
        scaling: of the softmax.
        softcap: of the logits, or None.
        sinks: float [Hq], or None.

    Returns:
        [B, Hq, 1, Dv]; zeros for a row without a slot.
    """
    batch, kv_heads, _, dim = key.shape
    rows, wanted = slots.shape
    group, value_dim = query.shape[1] // kv_heads, value.shape[-1]
    wanted_pad = power_of_two(wanted, 16)
    block = min(ATTEND_BLOCK if key.element_size() == 2 else 32, wanted_pad)
    out = query.new_empty(batch, kv_heads * group, 1, value_dim)
    overlap, launch = overlapping(query.device)
    attend_rows[(rows,)](
        query, key, value, slots, query if sinks is None else sinks, out, *_heads(key, value), wanted, scaling,
        softcap or 1.0, key.stride(2), value.stride(2), group, power_of_two(group, 16), dim,
        power_of_two(dim, 16), value_dim, power_of_two(value_dim, 16), wanted_pad, block,
        kv_heads, softcap is not None, sinks is not None, overlap, num_warps=ATTEND_WARPS, **launch,
    )  # fmt: skip
    return out


@torch.library.register_fake("fasa_flex::attend_slots")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@operator("hold_slots", mutates=("held", "held_at", "held_keys", "held_values"))
@on_their_device
def hold_slots(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    held: Tensor,
    held_at: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    length: Tensor | None,
) -> Tensor:
    """Make the device hold the rows at ``slots``, fetching those that it does not hold yet (FASA-M).

    Args:
        key: float [B, Hkv, T, D], each row contiguous; host memory that the device can read.
        value: likewise, [B, Hkv, T, Dv].
        slots: int32 [B * Hkv, K], ascending, -1 for none.
        held: int32 [B, Hkv, K], the slots held, ascending, -1 for none; afterwards ``slots``.
        held_at: int32 [B, Hkv, K], at which rows they are held: every number below K once.
        held_keys: float [B, Hkv, K, D], the rows.
        held_values: likewise, [B, Hkv, K, Dv].
        length: int64 scalar, the tokens in the cache where it may have been rewound unnoticed; rows from the last one
            on are fetched again.

    Returns:
        int32 [B * Hkv, K], where the rows at ``slots`` are among the held ones; -1 for none.
    """
    (rows, wanted), kv_heads = slots.shape, key.shape[1]
    dim, value_dim = key.shape[-1], value.shape[-1]
    overlap, launch = overlapping(slots.device)
    places, absent, scratch = (torch.empty_like(slots) for _ in range(3))
    find_rows[(rows,)](
        slots, held, held_at, places, absent, scratch, held if length is None else length, wanted,
        power_of_two(wanted), length is not None, overlap, num_warps=FIND_WARPS, **launch,
    )  # fmt: skip
    blocks = parts_of(wanted, FETCH_BLOCK)
    fetch_rows[(min(FETCH_PROGRAMS, rows * blocks),)](
        key, value, held_keys, held_values, absent, places, *_heads(key, value), wanted, blocks, rows * blocks,
        key.stride(2), value.stride(2), dim, power_of_two(dim), value_dim, power_of_two(value_dim),
        FETCH_BLOCK, kv_heads, overlap, num_warps=FETCH_WARPS, **launch,
    )  # fmt: skip
    return places


@torch.library.register_fake("fasa_flex::hold_slots")
def _(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    held: Tensor,
    held_at: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    length: Tensor | None,
) -> Tensor:
    return torch.empty_like(slots)


def _heads(key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """How far apart rows of the batch and heads are, in keys and in values."""
    return key.stride(0), key.stride(1), value.stride(0), value.stride(1)


def _integers(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.int32, device=like.device)


@operator("dense_decode")
@on_their_device
def dense_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One dense decode step under a mask, in which a group's query heads read each key and value once.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        key: float [B, Hkv, T, D], each row contiguous.
        value: likewise, [B, Hkv, T, Dv].
        codes: uint8 [B or 1, T], rows contiguous: 0 for an invalid key.
        scaling: of the softmax.
        softcap: of the logits, or None.
        sinks: float [Hq], or None.

    Returns:
        [B, Hq, 1, Dv]; zeros for a row without a valid key.
    """
    batch, kv_heads, kv_len, dim = key.shape
    rows, group, value_dim = batch * kv_heads, query.shape[1] // kv_heads, value.shape[-1]
    group_pad, value_pad = power_of_two(group, 16), power_of_two(value_dim, 16)
    block = ATTEND_BLOCK if key.element_size() == 2 else 32
    span = parts_of(parts_of(kv_len, min(MOST_PARTS, max(1, PROGRAMS // rows))), block) * block
    parts = parts_of(kv_len, span)
    overlap, launch = overlapping(query.device)
    bests, totals, results = (
        torch.empty(rows, parts, group, width, device=query.device) for width in (1, 1, value_pad)
    )
    attend_part[(parts, rows)](
        query, key, value, codes, bests, totals, results, *_heads(key, value), kv_len,
        0 if codes.shape[0] == 1 else codes.stride(0), span, scaling, softcap or 1.0, key.stride(2), value.stride(2),
        group, group_pad, dim, power_of_two(dim, 16), value_dim, value_pad, block, kv_heads,
        softcap is not None, overlap, num_warps=ATTEND_WARPS, **launch,
    )  # fmt: skip
    out = torch.empty(batch, kv_heads * group, 1, value_dim, dtype=query.dtype, device=query.device)
    merge_parts[(rows, group)](
        bests, totals, results, query if sinks is None else sinks, out, parts, group, value_dim, value_pad,
        power_of_two(parts), kv_heads, sinks is not None, overlap, num_warps=MERGE_WARPS, **launch,
    )  # fmt: skip
    return out


@torch.library.register_fake("fasa_flex::dense_decode")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])
