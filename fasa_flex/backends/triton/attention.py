"""FAC on a GPU: launches of the kernels that attend to selected rows, and of the merge of their parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasa_flex.backends.triton.kernels import (
    attend_rows,
    block_that_fits,
    merge_parts,
    overlapping,
    parts_of,
    power_of_two,
)
from fasa_flex.backends.triton.tip import Listed, Tip, given_or

ATTEND_BLOCK, ATTEND_WARPS, ATTEND_PROGRAMS, MOST_PARTS, MERGE_WARPS = 128, 4, 128, 128, 1
"""Keys and warps of a program, the number of programs that attend, most parts of a row, least warps of the merge."""

LEAST_SPAN = 16
"""Least keys of a program that attends, as few as a matrix product takes."""

FEW_PARTS = 8
"""Parts of a row that all merges of fewer are compiled for."""

SELECT_CHUNK = 1024
"""Listed keys that a program searches in registers."""


class Ending(NamedTuple):
    """The last arguments of `fasa_flex.backends.triton.decode.sparse_decode`: the completion and the learned sinks.

    Attributes:
        mean_value: the completion's state (`fasa_flex.core.completion`), [B, Hkv, Dv]; None: no completion.
        covariance: [B, Hkv, D or 0, Dv], likewise.
        covered: int64 [B, Hkv], likewise.
        strength: factor of the first-order term; 0: the mean value alone.
        sinks: learned sinks, float [Hq], contiguous, or None.
        states: row of each batch row's state if keys are in pages (`Tip.table`), int64 [B]; None: its own.
    """

    mean_value: Tensor | None = None
    covariance: Tensor | None = None
    covered: Tensor | None = None
    strength: float = 0.0
    sinks: Tensor | None = None
    states: Tensor | None = None


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor | None,
    found: Listed,
    units: Tensor,
    masses: Tensor,
    tip: Tip,
    ending: Ending,
) -> Tensor:
    """Attend to the rows at ``places``, or to those that the kernels select; returns [B, Hq, 1, Dv]."""
    (batch, kv_heads, _, dim), value_dim = key.shape, value.shape[3]
    rows, group = batch * kv_heads, query.shape[1] // kv_heads
    dim_pad, value_pad = power_of_two(dim, 16), power_of_two(value_dim, 16)
    most, size = ATTEND_BLOCK if key.element_size() == 2 else 32, (dim_pad + value_pad) * key.element_size()
    parts = min(MOST_PARTS, max(1, ATTEND_PROGRAMS // rows))
    span = parts_of(parts_of(found.width, parts), LEAST_SPAN) * LEAST_SPAN
    parts = parts_of(found.width, span)
    sums, results = (
        torch.empty(rows, parts, group, width, dtype=torch.float32, device=query.device) for width in (3, value_pad)
    )
    inputs, constants = _completing(query, tip, units)
    overlap, launch = overlapping(query.device)
    attend_rows[(rows, parts)](
        *found, span, found.slots if places is None else places, query, key, value, sums, results,
        *head_strides(key, value), tip.scaling, tip.softcap or 1.0, key.stride(2), value.stride(2),
        group, power_of_two(group, 16), dim, dim_pad, value_dim, value_pad,
        min(block_that_fits(query.device, size, most), power_of_two(span)), kv_heads, tip.softcap is not None,
        *inputs, query if tip.table is None else tip.table, tip.capacity, tip.stride, units.shape[2], *constants,
        tip.completes, SELECT_CHUNK, places is None, tip.page, overlap, num_warps=ATTEND_WARPS, **launch,
    )  # fmt: skip
    return merged(query, value, sums, results, ending, masses, tip.scaling)


def _completing(query: Tensor, tip: Tip, units: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the kernel `attend_rows` that score the selected keys again: its tensors, and its constants."""
    weights, scales, shift = (given_or(each, query) for each in (tip.weights, tip.scales, tip.shift))
    has = tip.scales is not None, tip.weights is not None, tip.shift is not None
    *sizes, integer, native = tip.layout(query)
    return (tip.dims, weights, tip.packed, scales, shift, units), (*sizes, tip.sums_pad, *has, integer, native)


def merged(
    query: Tensor,
    value: Tensor,
    sums: Tensor,
    results: Tensor,
    ending: Ending,
    masses: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """Merge the parts of rows into attention [B, Hq, 1, Dv], completed, beside learned sinks.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        value: as for `attend_slots`, of which the last dimension alone is read.
        sums: float32 [B * Hkv, parts, 3 * G], of the kernels `attend_rows` or `attend_part`.
        results: float32 [B * Hkv, parts, G, >= Dv], likewise.
        ending: completion and learned sinks.
        masses: as of `fasa_flex.backends.triton.tip.Ranking`; required with a completion.
        scaling: factor of the logits, likewise.
    """
    (rows, parts, group, value_pad), dim, out = results.shape, query.shape[3], result_of(query, value)
    state = (ending.mean_value, ending.covariance, ending.covered, ending.states)
    means, covariances, covered, states = (query if each is None else each for each in state)
    completes = ending.mean_value is not None
    first_order = completes and ending.strength != 0.0 and covariances.shape[2] > 0
    masses, parts_pad = query if masses is None else masses, power_of_two(parts, FEW_PARTS)
    overlap, launch = overlapping(query.device)
    merge_parts[(rows, group)](
        sums, results, query if ending.sinks is None else ending.sinks, out, parts, query, masses, means, covariances,
        covered, states, masses.shape[1], scaling * ending.strength, group, dim, power_of_two(dim, 16), value.shape[3],
        value_pad, parts_pad, query.shape[1] // group, ending.sinks is not None, completes, first_order,
        ending.states is not None, overlap, num_warps=merge_warps(parts_pad, value_pad), **launch,
    )  # fmt: skip
    return out


def merge_warps(parts_pad: int, value_pad: int) -> int:
    """Warps of a merge: a warp has registers for 32 parts of a value of 128 dimensions, and for its covariance."""
    return max(MERGE_WARPS, max(32, parts_pad) * value_pad // 4096)


def result_of(query: Tensor, value: Tensor) -> Tensor:
    """An empty result [B, Hq, 1, Dv]."""
    return query.new_empty(*query.shape[:3], value.shape[-1])


def head_strides(key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Strides of batch and head in keys, then in values."""
    return key.stride(0), key.stride(1), value.stride(0), value.stride(1)
