"""Update of the completion's state on a GPU by one kernel, without synchronising with the host."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.triton.attention import head_strides
from fasa_flex.backends.triton.kernels import cover_rows, on_their_device, overlapping, parts_of, power_of_two

COVER_WARPS, COVER_STAGES, MOST_PRODUCTS = 8, 2, 16384
"""Warps, pipeline stages, and most products of key and value dimensions that a program keeps in registers."""


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
    (batch, kv_heads, dim), value_dim, kv_len = key_sum.shape, value_sum.shape[2], number.shape[1]
    value_pad = power_of_two(value_dim, 16)
    part = min(power_of_two(dim or 1, 16), max(16, MOST_PRODUCTS // value_pad))
    overlap, launch = overlapping(covered.device)
    cover_rows[(batch * kv_heads,)](
        covered, key_sum, value_sum, product, mean_value, covariance, key, value,
        valid.contiguous().view(torch.uint8), number.contiguous(), *head_strides(key, value),
        *(0 if len(rows) == 1 else kv_len for rows in (valid, number)), kv_len, written,
        block, skipped, key.stride(2), value.stride(2), dim, part, max(1, parts_of(dim, part)), value_dim, value_pad,
        64 if value.element_size() == 2 else 32, kv_heads, overlap, num_warps=COVER_WARPS, num_stages=COVER_STAGES,
        **launch,
    )  # fmt: skip
