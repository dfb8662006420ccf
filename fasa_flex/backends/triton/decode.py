"""Operators of a sparse decode step on a GPU, which launch `fasa_flex.backends.triton.kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasa_flex.backends.triton.attention import SELECT_CHUNK, Ending, attended, head_strides, result_of
from fasa_flex.backends.triton.kernels import (
    fetch_rows,
    find_rows,
    on_their_device,
    overlapping,
    parts_of,
    power_of_two,
    select_keys,
)
from fasa_flex.backends.triton.tip import Listed, Tip, listed, ranked, unit_and_mass
from fasa_flex.core.compiler import operator

SELECT_WARPS = 8
FIND_WARPS, FETCH_BLOCK, FETCH_WARPS, FETCH_PROGRAMS = 8, 16, 4, 64
"""Keys and warps of a program. More than 64 programs fetch scattered host rows more slowly (measured on an H100)."""


def _empty_slots(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tip = Tip(*arguments)
    slots = torch.empty(query.shape[0] * tip.dims.shape[0], tip.width, dtype=torch.int32, device=query.device)
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
    marks: Tensor,
    sample: Tensor | None,
    kv_len: int,
    n_fac: int,
    share: int,
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
    ranks = (dims, weights, packed, scales, shift, marks, sample)
    tip = Tip(*ranks, kv_len, n_fac, share, how, scaling, softcap, completes, table, page, stride)
    ranking = ranked(query, tip)
    found = listed(ranking, tip)
    overlap, launch = overlapping(query.device)
    select_keys[(found.slots.shape[0],)](
        *found, 0, tip.width, SELECT_CHUNK, overlap, num_warps=SELECT_WARPS, **launch
    )  # fmt: skip
    return found.slots, ranking.units, ranking.masses


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
    marks: Tensor,
    sample: Tensor | None,
    kv_len: int,
    n_fac: int,
    share: int,
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
    ranks = (dims, weights, packed, scales, shift, marks, sample)
    tip = Tip(*ranks, kv_len, n_fac, share, how, scaling, softcap, completes, table, page, stride)
    ending = Ending(mean_value, covariance, covered, strength, sinks, states)
    found = Listed(slots, slots, slots, slots, 0, 0, 0, 0, 0, slots.shape[1], 1)
    return attended(query, key, value, places, found, units, masses, tip, ending)


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
    marks: Tensor,
    sample: Tensor | None,
    kv_len: int,
    n_fac: int,
    share: int,
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
    ranks = (dims, weights, packed, scales, shift, marks, sample)
    tip = Tip(*ranks, kv_len, n_fac, share, how, scaling, softcap, completes, table, page, stride)
    ending = Ending(mean_value, covariance, covered, strength, sinks, states)
    ranking = ranked(query, tip)
    return attended(query, key, value, None, listed(ranking, tip), ranking.units, ranking.masses, tip, ending)


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
        power_of_two(wanted), length is not None, overlap,
        num_warps=min(32, max(FIND_WARPS, power_of_two(wanted) // 256)), **launch,
    )  # fmt: skip
    blocks = parts_of(wanted, FETCH_BLOCK)
    fetch_rows[(min(FETCH_PROGRAMS, rows * blocks),)](
        key, value, held_keys, held_values, absent, places, *head_strides(key, value), wanted, blocks, rows * blocks,
        key.stride(2), value.stride(2), dim, power_of_two(dim), value_dim, power_of_two(value_dim),
        FETCH_BLOCK, kv_heads, overlap, num_warps=FETCH_WARPS, **launch,
    )  # fmt: skip
    return places
