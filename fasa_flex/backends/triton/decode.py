"""Operators of a sparse decode step on a GPU, which launch `fasa_flex.backends.triton.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasa_flex.backends.triton.kernels import (
    TILE,
    attend_rows,
    fetch_rows,
    find_rows,
    on_their_device,
    overlapping,
    parts_of,
    power_of_two,
    select_keys,
)
from fasa_flex.backends.triton.tip import Ending as Ending
from fasa_flex.backends.triton.tip import Ranking, Tip, completing, ranked, unit_and_mass
from fasa_flex.core.compiler import operator

SELECT_WARPS = 8
ATTEND_BLOCK, ATTEND_WARPS = 128, 4
FOCUS_WARPS, MOST_FOCUSED = 8, 8192  # more tiles: two kernels, since a longer search needs more registers
FIND_WARPS, FETCH_BLOCK, FETCH_WARPS, FETCH_PROGRAMS = 8, 16, 4, 64
"""Keys and warps of a program. More than 64 programs fetch scattered host rows more slowly (measured on an H100)."""


def _empty_slots(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tip = Tip(*arguments)
    slots = _integers(query, query.shape[0] * tip.dims.shape[0], min(tip.n_fac, tip.kv_len))
    return slots, *unit_and_mass(query, tip)


@operator("select_slots", _empty_slots)
@on_their_device
def select_slots(
    query: Tensor,
    dims: Tensor,
    weights: Tensor | None,
    packed: Tensor,
    scales: Tensor | None,
    shift: Tensor | None,
    valid: Tensor,
    forced: Tensor | None,
    sample: Tensor | None,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    completes: bool,
    table: Tensor | None,
    page: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """TIP and the selection for one query a row.

    Args:
        query: float [B, Hq, 1, D], contiguous; the other arguments are the fields of `Tip`.

    Returns:
        slots, int32 [B * Hkv, min(n_fac, T)], ascending, -1 if there are fewer valid keys; and the units and masses of
        `fasa_flex.backends.triton.tip.Ranking`.
    """
    ranking = (dims, weights, packed, scales, shift, valid, forced, sample, n_fac, how, scaling, softcap, completes)
    tip = Tip(*ranking, table, page, stride)
    found = ranked(query, tip)
    search = _search(found, tip.kv_len, n_fac)
    overlap, launch = overlapping(query.device)
    select_keys[(found.order.shape[0],)](*search, overlap, num_warps=SELECT_WARPS, **launch)
    return search.slots, found.units, found.masses


def _empty_result(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return result_of(query, value)


@operator("attend_slots", _empty_result)
@on_their_device
def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    slots: Tensor,
    units: Tensor,
    masses: Tensor,
    dims: Tensor,
    weights: Tensor | None,
    packed: Tensor,
    scales: Tensor | None,
    shift: Tensor | None,
    valid: Tensor,
    forced: Tensor | None,
    sample: Tensor | None,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    completes: bool,
    table: Tensor | None,
    page: int,
    stride: int,
    mean_value: Tensor | None,
    covariance: Tensor | None,
    covered: Tensor | None,
    strength: float,
    sinks: Tensor | None,
    states: Tensor | None,
) -> Tensor:
    """FAC for one query a row, completed, beside learned sinks.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        key: float [B, Hkv, T, D], rows contiguous; on the device or in pinned host memory (FASA-M), where the kernel
            reads only the selected rows.
        value: float [B, Hkv, T, Dv], likewise.
        places: int32 [B * Hkv, K], rows of ``key`` and ``value``; -1 for none.
        slots: int32 [B * Hkv, K], their packed keys; a result of `select_slots`, as ``units`` and ``masses`` are.
        dims: the first field of `Tip`; the arguments up to ``stride`` are the others, those after it of `Ending`.

    Returns:
        [B, Hq, 1, Dv], zeros for a head without a slot.
    """
    ranking = (dims, weights, packed, scales, shift, valid, forced, sample, n_fac, how, scaling, softcap, completes)
    tip = Tip(*ranking, table, page, stride)
    ending = Ending(mean_value, covariance, covered, strength, sinks, states)
    wanted = slots.shape[1]
    search = _Search(slots, slots, slots, slots, 0, 0, wanted, 2, power_of_two(wanted, 16), False)
    return _attend(query, key, value, places, search, units, masses, tip, ending, False, ATTEND_WARPS)


@operator("sparse_decode", _empty_result)
@on_their_device
def sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dims: Tensor,
    weights: Tensor | None,
    packed: Tensor,
    scales: Tensor | None,
    shift: Tensor | None,
    valid: Tensor,
    forced: Tensor | None,
    sample: Tensor | None,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    completes: bool,
    table: Tensor | None,
    page: int,
    stride: int,
    mean_value: Tensor | None,
    covariance: Tensor | None,
    covered: Tensor | None,
    strength: float,
    sinks: Tensor | None,
    states: Tensor | None,
) -> Tensor:
    """TIP, the selection and FAC for one query a row: `select_slots`, then `attend_slots`, with their arguments."""
    ranking = (dims, weights, packed, scales, shift, valid, forced, sample, n_fac, how, scaling, softcap, completes)
    tip = Tip(*ranking, table, page, stride)
    ending = Ending(mean_value, covariance, covered, strength, sinks, states)
    if parts_of(tip.kv_len, TILE.value) > MOST_FOCUSED:
        slots, units, masses = select_slots(query, *tip)
        return attend_slots(query, key, value, slots, slots, units, masses, *tip, *ending)
    found = ranked(query, tip)
    search = _search(found, tip.kv_len, n_fac)
    units, masses = found.units, found.masses
    return _attend(query, key, value, search.slots, search, units, masses, tip, ending, True, FOCUS_WARPS)


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
    """Copy the rows at ``slots`` from host memory, unless they are on the device from the last step (FASA-M).

    Args:
        key: float [B, Hkv, T, D], rows contiguous, in host memory that the device can read.
        value: float [B, Hkv, T, Dv], likewise.
        slots: int32 [B * Hkv, K], ascending, -1 for none.
        held: int32 [B, Hkv, K], slots of the rows on the device, ascending, -1 for none; set to ``slots``.
        held_at: int32 [B, Hkv, K], the places of these rows in ``held_keys``, a permutation of 0 .. K - 1; updated.
        held_keys: float [B, Hkv, K, D], keys on the device; updated.
        held_values: float [B, Hkv, K, Dv], values on the device; updated.
        length: int64 scalar, tokens in the cache, if it may have been rewound without notice: rows from the last token
            on are fetched again. None otherwise.

    Returns:
        int32 [B * Hkv, K], the places of the rows at ``slots``; -1 for none.
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


class _Search(NamedTuple):
    """Arguments of the kernel `select_keys`."""

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


def _search(ranking: Ranking, kv_len: int, n_fac: int) -> _Search:
    order, maxima = ranking.order, ranking.maxima
    rows, tiles, wanted = order.shape[0], parts_of(kv_len, TILE.value), min(n_fac, kv_len)
    wanted_pad = power_of_two(wanted, 16)
    return _Search(
        order, maxima, _integers(order, rows, wanted_pad), _integers(order, rows, wanted),
        order.stride(0), maxima.stride(0), wanted, power_of_two(tiles, 2), wanted_pad, tiles > wanted_pad,
    )  # fmt: skip


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    search: _Search,
    units: Tensor,
    masses: Tensor,
    tip: Tip,
    ending: Ending,
    selects: bool,
    warps: int,
) -> Tensor:
    """Launch the kernel `attend_rows`, with `select_keys` in it if it ``selects``; returns [B, Hq, 1, Dv]."""
    kv_heads, dim, value_dim = key.shape[1], key.shape[3], value.shape[3]
    group, out = query.shape[1] // kv_heads, result_of(query, value)
    block = min(ATTEND_BLOCK if key.element_size() == 2 else 32, search.WANTED_PAD)
    means, covariances, covered = (query if each is None else each for each in ending[:3])
    first_order = ending.strength != 0.0 and covariances.shape[2] > 0
    inputs, constants = completing(query, tip, units, masses)
    overlap, launch = overlapping(query.device)
    attend_rows[(query.shape[0] * kv_heads,)](
        *search, places, query, key, value, out, query if ending.sinks is None else ending.sinks,
        *head_strides(key, value), tip.scaling, tip.softcap or 1.0, key.stride(2), value.stride(2),
        group, power_of_two(group, 16), dim, power_of_two(dim, 16), value_dim, power_of_two(value_dim, 16), block,
        kv_heads, tip.softcap is not None, ending.sinks is not None, *inputs, means, covariances, covered,
        query if tip.table is None else tip.table, query if ending.states is None else ending.states, tip.capacity,
        tip.stride, units.shape[1], masses.shape[1], ending.strength, *constants, tip.completes, first_order, selects,
        tip.page, overlap, num_warps=warps, **launch,
    )  # fmt: skip
    return out


def result_of(query: Tensor, value: Tensor) -> Tensor:
    """An empty result [B, Hq, 1, Dv]."""
    return query.new_empty(*query.shape[:3], value.shape[-1])


def head_strides(key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Strides of batch and head in keys, then in values."""
    return key.stride(0), key.stride(1), value.stride(0), value.stride(1)


def _integers(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.int32, device=like.device)
