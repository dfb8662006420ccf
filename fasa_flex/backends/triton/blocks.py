"""The estimate of a prefill by blocks on a GPU, which launches `fasa_flex.backends.triton.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.triton.kernels import estimate_blocks, on_their_device, overlapping, power_of_two
from fasa_flex.prefill.grid import BLOCK

KEYS, ESTIMATE_WARPS, ESTIMATE_STAGES = 128, 4, 3
"""Representatives of keys that a program reads at one time, its warps and its pipeline stages: not tuned."""


@on_their_device
def mass_by_kernel(
    query: Tensor, key: Tensor, first: Tensor, scaling: float, softcap: float | None, by_head: bool, strongest: bool
) -> Tensor:
    """`fasa_flex.prefill.estimators.attention_mass` of few representatives: float32 [B, H, G or 1, M, N].

    Args:
        query: float [B, H, G, M, S, P], representatives of the queries; S is a power of two.
        key: float [B, H, N, S', P], of the keys; S' is a power of two, at most `KEYS`.
        first: int64 [B or 1], number of the first block of queries.
        scaling: factor of the logits.
        softcap: soft cap of the scaled logits, or None.
        by_head: as for `attention_mass`, like ``strongest``.
    """
    (batch, heads, group, n_queries, split, width), (n_keys, parts) = query.shape, key.shape[2:4]
    together = 1 if by_head else group
    mass = query.new_zeros(batch, heads, group // together, n_queries, n_keys, dtype=torch.float32)
    if query.dtype != key.dtype:
        query, key = query.float(), key.float()
    overlap, launch = overlapping(query.device)
    estimate_blocks[(n_queries, batch * heads * (group // together))](
        query.contiguous(), key.contiguous(), first, mass, 0 if len(first) == 1 else first.stride(0), n_queries,
        n_keys, scaling, softcap or 1.0, heads, group, split, parts, BLOCK, together,
        power_of_two(together * split, 16), width, power_of_two(width, 16), KEYS, strongest, softcap is not None,
        overlap, num_warps=ESTIMATE_WARPS, num_stages=ESTIMATE_STAGES, **launch,
    )  # fmt: skip
    return mass
