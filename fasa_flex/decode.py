"""A sparse decode step on a GPU as operators over the kernels of `fasa_flex.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasa_flex.kernels import (
    TILE,
    attend_rows,
    fetch_rows,
    find_rows,
    focus_rows,
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
FOCUS_WARPS, MOST_FOCUSED = 4, 4096  # at once while there are no more tiles: a longer search wants more warps
FIND_WARPS, FETCH_BLOCK, FETCH_WARPS, FETCH_PROGRAMS = 8, 16, 4, 64
"""Keys and warps of a program, the fastest of those tried on an H100; more tiles than counted are guessed at too.

More programs than 64 fetch scattered rows of the host more slowly.
"""


@operator(
    "select_slots",
    lambda query, dims, packed, scales, codes, n_fac, *_: _integers(
        query, query.shape[0] * dims.shape[0], min(n_fac, codes.shape[1])
    ),
)
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
    order, maxima = _ranked(query, dims, packed, scales, codes, how, scaling)
    search = _search(order, maxima, codes.shape[1], n_fac)
    overlap, launch = overlapping(query.device)
    select_keys[(order.shape[0],)](*search, overlap, num_warps=SELECT_WARPS, **launch)
    return search.slots


@operator("attend_slots", lambda query, key, value, *_: result_of(query, value))
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
    rows, wanted = slots.shape
    out, attention = _attention(query, key, value, wanted, scaling, softcap, sinks)
    overlap, launch = overlapping(query.device)
    attend_rows[(rows,)](slots, wanted, power_of_two(wanted, 16), *attention, overlap, num_warps=ATTEND_WARPS, **launch)
    return out


@operator("sparse_decode", lambda query, key, value, *_: result_of(query, value))
@on_their_device
def sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dims: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """TIP, the selection and FAC for one query a row: `select_slots` and `attend_slots`, arguments likewise.

    Returns:
        [B, Hq, 1, Dv]; zeros for a row without a valid key.
    """
    ranked_by = (dims, packed, scales, codes, n_fac, how, scaling)
    if parts_of(codes.shape[1], TILE.value) > MOST_FOCUSED:
        slots = select_slots(query, *ranked_by)
        return attend_slots(query, key, value, slots, scaling, softcap, sinks)
    order, maxima = _ranked(query, dims, packed, scales, codes, how, scaling)
    search = _search(order, maxima, codes.shape[1], n_fac)
    out, attention = _attention(query, key, value, search.wanted, scaling, softcap, sinks)
    overlap, launch = overlapping(query.device)
    focus_rows[(order.shape[0],)](*search, *attention, overlap, num_warps=FOCUS_WARPS, **launch)
    return out


@operator(
    "hold_slots",
    lambda key, value, slots, *_: torch.empty_like(slots),
    mutates=("held", "held_at", "held_keys", "held_values"),
)
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
        key, value, held_keys, held_values, absent, places, *head_strides(key, value), wanted, blocks, rows * blocks,
        key.stride(2), value.stride(2), dim, power_of_two(dim), value_dim, power_of_two(value_dim),
        FETCH_BLOCK, kv_heads, overlap, num_warps=FETCH_WARPS, **launch,
    )  # fmt: skip
    return places


def _ranked(
    query: Tensor, dims: Tensor, packed: Tensor, scales: Tensor | None, codes: Tensor, how: str, scaling: float
) -> tuple[Tensor, Tensor]:
    """TIP: the order of every key, int32 [B * Hkv, >= T], and of every tile of keys its maximum."""
    batch, query_heads, _, dim = query.shape
    kv_heads, width = dims.shape
    kv_len, group, rows = codes.shape[1], query_heads // kv_heads, batch * kv_heads
    mixed = how == "softmax" and group > 1
    group_pad, block = power_of_two(group, 16), MIXED_BLOCK if mixed else SCORE_BLOCK
    whole = MIX_BLOCK if mixed else 16 * TILE.value  # keys: of sixteens of tiles, which threads read in fours
    covered = parts_of(kv_len, whole) * whole
    blocks = covered // block
    order, maxima = _integers(query, rows, covered), _integers(query, rows, covered // TILE.value)
    sizes = (kv_len, blocks, blocks) if mixed else (0, 0, 0)
    scores, top, total = (torch.empty(rows, group, size, dtype=torch.float32, device=query.device) for size in sizes)
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
    return order, maxima


class _Search(NamedTuple):
    """What `select_keys` is handed."""

    order: Tensor
    maxima: Tensor
    tiles: Tensor
    slots: Tensor
    order_stride: int
    maxima_stride: int
    wanted: int
    TILES_PAD: int
    WANTED_PAD: int
    SEARCH: bool
    GUESS: bool


def _search(order: Tensor, maxima: Tensor, kv_len: int, n_fac: int) -> _Search:
    rows, tiles, wanted = order.shape[0], parts_of(kv_len, TILE.value), min(n_fac, kv_len)
    wanted_pad = power_of_two(wanted, 16)
    return _Search(
        order, maxima, _integers(order, rows, wanted_pad), _integers(order, rows, wanted),
        order.stride(0), maxima.stride(0), wanted, power_of_two(tiles, 2), wanted_pad,
        tiles > wanted_pad, tiles > MOST_COUNTED,
    )  # fmt: skip


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wanted: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, tuple[Any, ...]]:
    """A result [B, Hq, 1, Dv] and what `attend_rows` is handed for it, but the slots."""
    kv_heads, dim, value_dim = key.shape[1], key.shape[3], value.shape[3]
    group = query.shape[1] // kv_heads
    out = result_of(query, value)
    block = min(ATTEND_BLOCK if key.element_size() == 2 else 32, power_of_two(wanted, 16))
    return out, (
        query, key, value, query if sinks is None else sinks, out, *head_strides(key, value), scaling, softcap or 1.0,
        key.stride(2), value.stride(2), group, power_of_two(group, 16), dim, power_of_two(dim, 16),
        value_dim, power_of_two(value_dim, 16), block, kv_heads, softcap is not None, sinks is not None,
    )  # fmt: skip


def result_of(query: Tensor, value: Tensor) -> Tensor:
    """Room for a result [B, Hq, 1, Dv]."""
    return query.new_empty(*query.shape[:3], value.shape[-1])


def head_strides(key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """How far apart rows of the batch and heads are, in keys and in values."""
    return key.stride(0), key.stride(1), value.stride(0), value.stride(1)


def _integers(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.int32, device=like.device)
