"""TIP on a GPU: launches of the kernels that rank all keys of a decode step, and of the selected keys' share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.backends.triton.kernels import (
    TILE,
    mix_group,
    overlapping,
    parts_of,
    power_of_two,
    score_keys,
    share_kept,
)

SCORE_BLOCK, KEPT_BLOCK, SCORE_WARPS = 128, 256, 4  # KEPT_BLOCK if logits are kept for a softmax over all keys
MIX_BLOCK, MIX_WARPS = 1024, 8
SHARE_BLOCK, SHARE_WARPS = 128, 4
"""Keys and warps of a program: the fastest of those measured on an H100."""


class Tip(NamedTuple):
    """The arguments of `fasa_flex.backends.triton.decode.select_slots` after the query: how keys are ranked.

    Attributes:
        dims: dominant dimensions, int64 [Hkv, 2 * n_tip], contiguous.
        weights: factors of the query in these, float32 [Hkv, 2 * n_tip], contiguous; None: 1.
        packed: packed keys [B, Hkv, C, P], contiguous, C >= T; P is 2 * n_tip for float dtypes and int8, n_tip for
            uint8, two codes of four bits (`fasa_flex.core.packed_keys`).
        scales: scales of integer keys, float16 [B, Hkv, C]; None for float dtypes.
        shift: number added to the scores of a query head, float32 [B * Hq], contiguous; None: 0.
        codes: codes of keys, uint8 [B or 1, T], rows contiguous: 0 for an invalid key; else a sum of 1 for valid, 2 for
            forced and 4 for sampled.
        n_fac: tokens to select; as many tiles of 16 keys are searched in registers.
        how: ranking of a group's heads: "softmax", "softmax_exact", "mean" or "max".
        scaling: factor of the logits.
        softcap: soft cap of the scaled logits, or None.
        completes: whether to compute the selected keys' share of the mass.
    """

    dims: Tensor
    weights: Tensor | None
    packed: Tensor
    scales: Tensor | None
    shift: Tensor | None
    codes: Tensor
    n_fac: int
    how: str
    scaling: float
    softcap: float | None
    completes: bool

    @property
    def kv_len(self) -> int:
        """T, the number of keys."""
        return self.codes.shape[1]


class Ranking(NamedTuple):
    """TIP's ranking of every key; a row is one key/value head of one batch row.

    Attributes:
        order: int32 [B * Hkv, >= T], integers in the order of the ranking.
        maxima: int32 [B * Hkv, tiles], the largest of each tile of ``order``.
        logits: float32 [B * Hkv, T, G], if a softmax or a share needs them.
        masses: float32 [B * Hkv, N, G], log-sum-exps of the valid keys of N blocks, if a sum over all keys is needed.
    """

    order: Tensor
    maxima: Tensor
    logits: Tensor
    masses: Tensor


def ranked(query: Tensor, tip: Tip) -> Ranking:
    """Rank all keys for a query [B, Hq, 1, D], contiguous."""
    batch, query_heads, _, dim = query.shape
    (kv_heads, width), kv_len = tip.dims.shape, tip.kv_len
    group, rows, codes, packed = query_heads // kv_heads, batch * kv_heads, tip.codes, tip.packed
    how = tip.how if group > 1 else "max"
    mixed = how in ("softmax", "softmax_exact")
    sums, samples = tip.completes or how == "softmax_exact", how == "softmax"
    kept, part = mixed or sums, packed.shape[3]
    block = KEPT_BLOCK if kept else SCORE_BLOCK
    whole = MIX_BLOCK if mixed else 16 * TILE.value  # 16 tiles, so that threads can read four maxima at a time
    covered = parts_of(kv_len, whole) * whole
    blocks = covered // block

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=query.device)

    order, maxima = empty(covered, dtype=torch.int32), empty(covered // TILE.value, dtype=torch.int32)
    logits = empty(kv_len if kept else 0, group)
    masses, sample = empty(blocks if sums else 0, group), empty(blocks if samples else 0, group)
    code_stride = 0 if codes.shape[0] == 1 else codes.stride(0)
    overlap, launch = overlapping(query.device)
    score_keys[(blocks, rows)](
        query, tip.dims, _or(tip.weights, query), packed, _or(tip.scales, query), _or(tip.shift, query), codes, logits,
        masses, sample, order, maxima, order.stride(0), maxima.stride(0), kv_len, code_stride, packed.stride(1),
        blocks, tip.scaling, tip.softcap or 1.0, group, power_of_two(group, 16), dim, width, part,
        power_of_two(part, 16), block, tip.scales is not None, tip.weights is not None, tip.shift is not None,
        tip.softcap is not None, how, sums, kv_heads, overlap, num_warps=SCORE_WARPS, **launch,
    )  # fmt: skip
    if mixed:
        mix_group[(covered // MIX_BLOCK, rows)](
            logits, sample if samples else masses, codes, order, maxima, order.stride(0), maxima.stride(0), kv_len,
            code_stride, blocks, group, power_of_two(group), MIX_BLOCK, how, kv_heads, overlap, num_warps=MIX_WARPS,
            **launch,
        )  # fmt: skip
    return Ranking(order, maxima, logits, masses)


def kept_share(query: Tensor, ranking: Ranking, slots: Tensor, tip: Tip) -> Tensor:
    """Share of the keys at ``slots`` in the mass of all valid keys: float32 [B, Hkv, G, 1], or empty (`share_of`).

    Args:
        query: as for `ranked`.
        ranking: result of `ranked`.
        slots: int32 [B * Hkv, K], -1 for none.
        tip: as for `ranked`.
    """
    share = share_of(query, tip.dims, tip.completes)
    if not tip.completes:
        return share
    rows, kv_len, group = ranking.logits.shape
    overlap, launch = overlapping(query.device)
    share_kept[(rows,)](
        ranking.logits, ranking.masses, slots, share, kv_len, slots.shape[1], ranking.masses.shape[1],
        group, power_of_two(group), SHARE_BLOCK, overlap, num_warps=SHARE_WARPS, **launch,
    )  # fmt: skip
    return share


def share_of(query: Tensor, dims: Tensor, completes: bool) -> Tensor:
    """An uninitialised share, float32 [B, Hkv, G, 1]; of no elements without completion."""
    heads = (query.shape[0], dims.shape[0], query.shape[1] // dims.shape[0], 1)
    return query.new_empty(heads if completes else (0,), dtype=torch.float32)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or ``other`` in its place for an argument that the kernel does not read."""
    return other if tensor is None else tensor
