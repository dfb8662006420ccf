"""Update of the completion's state on a GPU by one kernel, without synchronising with the host."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.triton.attention import head_strides
from fasa_flex.backends.triton.kernels import cover_rows, on_their_device, overlapping, parts_of, power_of_two
from fasa_flex.core.completion import CompletionState

COVER_WARPS, COVER_STAGES, MOST_PRODUCTS = 8, 1, 16384
"""Warps, pipeline stages, and most products of key and value dimensions that a program keeps in registers.

With two stages Triton 3.6 and 3.7 copy the next keys over those that a product still reads (triton issue 6691).
"""


@on_their_device
def cover_by_kernel(
    covered: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    product: Tensor,
    mean_value: Tensor,
    covariance: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    number: Tensor,
    written: int,
    block: int,
    skipped: int,
) -> None:
    """`fasa_flex.core.completion.cover_blocks` for contiguous state, and keys and values with contiguous rows.

    One program for each row and key/value head reads the new keys and values, from the device or from mapped host
    memory.

    Args:
        covered: the first of `CompletionState.tensors`; the arguments up to ``covariance`` are the others.
        key: as for `CompletionState.advance`, like the arguments up to ``written``.
        block: valid tokens that are covered at one time.
        skipped: number of first tokens that are left out.
    """
    kv_len = number.shape[1]
    _cover(
        (covered, key_sum, value_sum, product, mean_value, covariance), key, value,
        (valid.contiguous().view(torch.uint8), number.contiguous(), number, number), len(covered),
        (*(0 if len(rows) == 1 else kv_len for rows in (valid, number)), kv_len, written, 0, 0), (block, skipped), 0,
    )  # fmt: skip


@on_their_device
def cover_pages_by_kernel(
    state: CompletionState,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    table: Tensor,
    states: Tensor,
    page: int,
    stride: int,
    block: int,
    skipped: int,
) -> None:
    """Update the states of requests whose keys and values are in pages.

    Args:
        state: the states of all requests in the cache.
        keys: float [R, Hkv, D], the rows of all pages, rows contiguous.
        values: float [R, Hkv, Dv], likewise.
        lengths: int64 [B], number of tokens of each request.
        table: int64 [B, n], the blocks of each request.
        states: int64 [B], the rows of the requests' states.
        page: number of tokens in a block.
        stride: distance of two blocks in rows of ``keys``.
        block: as for `cover_by_kernel`, as ``skipped`` is.
    """
    key, value = (rows.transpose(0, 1)[None].expand(len(states), -1, -1, -1) for rows in (keys, values))
    _cover(
        state.tensors, key, value, (lengths, lengths, table, states), len(states),
        (0, 0, 0, 0, table.stride(0), stride), (block, skipped), page,
    )  # fmt: skip


def _cover(
    state: tuple[Tensor, ...],
    key: Tensor,
    value: Tensor,
    marks: tuple[Tensor, ...],
    batch: int,
    numbers: tuple[int, ...],
    sizes: tuple[int, int],
    page: int,
) -> None:
    """Launch the kernel."""
    (_, kv_heads, dim), value_dim = state[1].shape, state[2].shape[2]
    value_pad = power_of_two(value_dim, 16)
    part = min(power_of_two(dim or 1, 16), max(16, MOST_PRODUCTS // value_pad))
    overlap, launch = overlapping(state[0].device)
    cover_rows[(batch * kv_heads,)](
        *state, key, value, *marks, *head_strides(key, value), *numbers, *sizes, key.stride(2), value.stride(2), dim,
        part, max(1, parts_of(dim, part)), value_dim, value_pad, 64 if value.element_size() == 2 else 32, page,
        kv_heads, overlap, num_warps=COVER_WARPS, num_stages=COVER_STAGES, **launch,
    )  # fmt: skip
