"""TIP on a GPU: the launches that rank all keys of a decode step, and tell the share of the selected ones."""

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

SCORE_BLOCK, KEPT_BLOCK, SCORE_WARPS = 128, 256, 4  # kept: where every block adds to a softmax over all
MIX_BLOCK, MIX_WARPS = 1024, 8
SHARE_BLOCK, SHARE_WARPS = 128, 4
"""Keys and warps of a program, the fastest of those tried on an H100."""


class Tip(NamedTuple):
    """How keys are ranked: what `fasa_flex.backends.triton.decode.select_slots` is handed beside the query.

    Attributes:
        dims: int64 [Hkv, 2 * n_tip], contiguous, the dominant dimensions.
        weights: float32 [Hkv, 2 * n_tip], contiguous, that the query is multiplied by there; None: 1.
        packed: [B, Hkv, C, P], contiguous, C >= T; P is 2 * n_tip for a float dtype and int8, n_tip for uint8, which
            holds keys of four bits as `fasa_flex.core.packed_keys` does.
        scales: float16 [B, Hkv, C] of integer keys.
        shift: float32 [B * Hq], contiguous, what the scores of a query head are more; None: 0.
        codes: uint8 [B or 1, T], rows contiguous: 0 for an invalid key, 1 for a valid one, 2 more for one that is
            forced in, 4 more for one of the sample.
        n_fac: tokens; K tiles of 16 keys are searched in registers, so a few hundred.
        how: "softmax", "softmax_exact", "mean" or "max", over the group.
        scaling: of the softmax.
        softcap: of its logits, or None.
        completes: whether the share of the selected keys is asked for.
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
        """T."""
        return self.codes.shape[1]


class Ranking(NamedTuple):
    """What TIP says of every key; rows are key/value heads of the batch.

    Attributes:
        order: int32 [B * Hkv, >= T], in the order of the ranking.
        maxima: int32, of every tile of keys the largest.
        logits: float32 [B * Hkv, T, G], where a softmax or a share needs them.
        masses: float32 [B * Hkv, N, G], the log-sum-exps of the valid keys of N blocks, where a share needs them.
    """

    order: Tensor
    maxima: Tensor
    logits: Tensor
    masses: Tensor


def ranked(query: Tensor, tip: Tip) -> Ranking:
    """TIP for a query [B, Hq, 1, D], contiguous."""
    batch, query_heads, _, dim = query.shape
    (kv_heads, width), kv_len = tip.dims.shape, tip.kv_len
    group, rows, codes, packed = query_heads // kv_heads, batch * kv_heads, tip.codes, tip.packed
    how = tip.how if group > 1 else "max"
    mixed = how in ("softmax", "softmax_exact")
    sums, samples = tip.completes or how == "softmax_exact", how == "softmax"
    kept, part = mixed or sums, packed.shape[3]
    block = KEPT_BLOCK if kept else SCORE_BLOCK
    whole = MIX_BLOCK if mixed else 16 * TILE.value  # keys: of sixteens of tiles, which threads read in fours
    covered = parts_of(kv_len, whole) * whole
    blocks = covered // block

    def room(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=of, device=query.device)

    order, maxima = room(covered, of=torch.int32), room(covered // TILE.value, of=torch.int32)
    logits = room(kv_len if kept else 0, group)
    masses, sample = room(blocks if sums else 0, group), room(blocks if samples else 0, group)
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
    """The share of the mass of all valid keys that those at ``slots`` hold: float32 [B, Hkv, G, 1], or as `no_share`.

    Args:
        query: as for `ranked`.
        ranking: its result.
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
    """Room for a share, float32 [B, Hkv, G, 1]; of no number where nothing is completed."""
    heads = (query.shape[0], dims.shape[0], query.shape[1] // dims.shape[0], 1)
    return query.new_empty(heads if completes else (0,), dtype=torch.float32)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is handed for a tensor that it does not read."""
    return other if tensor is None else tensor
