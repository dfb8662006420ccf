"""The operator of a dense decode step on a GPU, which launches `fasa_flex.backends.triton.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.triton.attention import MOST_PARTS, Ending, head_strides, merged, result_of
from fasa_flex.backends.triton.kernels import (
    attend_part,
    block_that_fits,
    on_their_device,
    overlapping,
    parts_of,
    power_of_two,
)
from fasa_flex.core.compiler import operator

BLOCK, PROGRAMS, DENSE_WARPS = 128, 256, 4
"""Keys, programs and warps of a dense layer's attention: two programs a multiprocessor."""


@operator("dense_decode", lambda query, key, value, *_: result_of(query, value))
@on_their_device
def dense_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One dense decode step under a mask, in which a group's query heads read each key and value once.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        key: float [B, Hkv, T, D], rows contiguous.
        value: float [B, Hkv, T, Dv], rows contiguous.
        valid: 1 for valid keys, uint8 [B or 1, T], rows contiguous.
        scaling: factor of the logits.
        softcap: soft cap of the scaled logits, or None.
        sinks: learned sinks, float [Hq], or None.

    Returns:
        [B, Hq, 1, Dv]; zeros for a row without a valid key.
    """
    batch, kv_heads, kv_len, dim = key.shape
    rows, group, value_dim = batch * kv_heads, query.shape[1] // kv_heads, value.shape[-1]
    group_pad, dim_pad, value_pad = (power_of_two(size, 16) for size in (group, dim, value_dim))
    size = (dim_pad + value_pad) * key.element_size()
    block = block_that_fits(query.device, size, BLOCK if key.element_size() == 2 else 32)
    span = parts_of(parts_of(kv_len, min(MOST_PARTS, max(1, PROGRAMS // rows))), block) * block
    parts = parts_of(kv_len, span)
    overlap, launch = overlapping(query.device)
    sums, results = (
        torch.empty(rows, parts, group, width, dtype=torch.float32, device=query.device) for width in (3, value_pad)
    )
    attend_part[(parts, rows)](
        query, key, value, valid, sums, results, *head_strides(key, value), kv_len,
        0 if valid.shape[0] == 1 else valid.stride(0), span, scaling, softcap or 1.0, key.stride(2), value.stride(2),
        group, group_pad, dim, dim_pad, value_dim, value_pad, block, kv_heads,
        softcap is not None, overlap, num_warps=DENSE_WARPS, **launch,
    )  # fmt: skip
    return merged(query, value, sums, results, Ending(sinks=sinks))
