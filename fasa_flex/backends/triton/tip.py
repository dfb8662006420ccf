"""TIP on a GPU: launches of the kernels that rank all keys of a decode step in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasa_flex.backends.triton.kernels import (
    BINS,
    list_keys,
    overlapping,
    parts_of,
    power_of_two,
    score_keys,
    sum_keys,
)

LEAST_SUM, SUM_BLOCK, MOST_SUMS, SUM_WARPS = 64, 256, 32, 4
SCORE_BLOCK, SCORE_WARPS, SCORE_STAGES, SCORE_PROGRAMS, MOST_STEPS = 256, 4, 3, 512, 64
"""Keys, warps and pipeline stages of a program, and limits of their numbers (`evals.bench.kernels` times others)."""

FOLD = 4
"""Four-bit or eight-bit keys in a row of a matrix product."""

MANY_BLOCKS, MANY_PROGRAMS, MANY_REGISTERS = 8192, 640, 96
"""From so many blocks on, folded keys are scored by so many programs of so few registers that five, not four, share a
multiprocessor. For 8 rows of 131072 keys scoring takes 8 % less time, for one 2 % more (measured on an H200)."""

TILE, FEW_TILES, LIST_TILES, LIST_KEYS, LIST_WARPS, LIST_PROGRAMS = 16, 128, 512, 1024, 8, 256
"""Keys of a tile, whose maximum is compared before its keys; the least and the most tiles, then keys, that a program
which lists keys reads at one time; its warps, and about the number of such programs."""

SEGMENTS, FEW_SEGMENTS = 16, 8
"""Segments of a row, each of which a program lists, and those of one of many rows; two numbers compile few kernels."""

WIDE = 16384
"""Bytes of a block of packed keys from which a program takes half as many keys, in two stages."""


class Tip(NamedTuple):
    """The arguments of `fasa_flex.backends.triton.decode.select_slots` after the query: how keys are ranked.

    Attributes:
        dims: dominant dimensions, int64 [Hkv, 2 * n_tip], contiguous.
        weights: factors of the query in these, float32 [Hkv, 2 * n_tip], contiguous; None: 1.
        packed: packed keys [B, Hkv, C, P], contiguous, C >= T, a multiple of 16; P is 2 * n_tip for float dtypes
            and int8, n_tip for uint8, two codes of four bits (`fasa_flex.core.packed_keys`).
        scales: scales of integer keys, float16 [B, Hkv, C]; None for float dtypes.
        shift: number added to the scores of a query head, float32 [B * Hq], contiguous; None: 0.
        marks: `fasa_flex.core.selection.Marks.bytes`, uint8 [B or 1, N], rows contiguous.
        sample: slots of sampled keys, int64 [B or 1, S], -1 for none, rows contiguous; their mass is the unit of the
            weights. None: all valid keys.
        kv_len: T, the number of keys.
        n_fac: tokens to select at most.
        share: trillionths of a row's valid keys to select at most (`Budget.trillionths`).
        how: ranking of a group's heads: "softmax" (the sum of their weights), "mean" or "max" (of their scores).
        scaling: factor of the logits.
        softcap: soft cap of the scaled logits, or None.
        completes: whether to compute the mass of all valid keys.
        table: blocks of each batch row if packed keys, keys and values are in pages, int64 [B, n]; None: they are not.
            Packed keys are then [blocks, Hkv, page, P], their scales [blocks, Hkv, page].
        page: number of tokens in a block; 0: no pages.
        stride: distance of two blocks in rows of keys and values.
    """

    dims: Tensor
    weights: Tensor | None
    packed: Tensor
    scales: Tensor | None
    shift: Tensor | None
    marks: Tensor
    sample: Tensor | None
    kv_len: int
    n_fac: int
    share: int
    how: str
    scaling: float
    softcap: float | None
    completes: bool
    table: Tensor | None = None
    page: int = 0
    stride: int = 0

    @property
    def capacity(self) -> int:
        """The kernels' ``capacity``: slots of a head's packed keys, or blocks of a row of the table."""
        return self.packed.shape[2] if self.table is None else self.table.stride(0)

    @property
    def width(self) -> int:
        """The largest number of slots that a row selects."""
        return min(self.n_fac, self.kv_len)

    @property
    def tile(self) -> int:
        """Keys of a tile: 1 where most tiles of `TILE` would have a selected key, as in `fasa_flex.core.ranking`."""
        return 1 if self.kv_len < 2 * TILE * self.width else TILE

    @property
    def weighs(self) -> bool:
        """Whether weights are computed, relative to the mass of `sample`."""
        return self.how == "softmax" or self.completes

    def layout(self, query: Tensor) -> tuple[int, int, int, bool, bool]:
        """WIDTH, PART, PART_PAD, INTEGER and NATIVE of the kernels.

        These are dimensions of a packed key, its elements, and these padded; whether products are of integers, as they
        are for queries in half precision; and whether codes are unpacked by NVIDIA's instructions.
        """
        integer = self.scales is not None and query.element_size() == 2
        native = integer and query.is_cuda and torch.version.hip is None
        part = self.packed.shape[3]
        return self.dims.shape[1], part, power_of_two(part, 32 if integer else 16), integer, native

    @property
    def sums(self) -> tuple[int, int, int]:
        """Keys of a block of `sum_keys`, parts of a row, and blocks of a part; no parts if nothing is weighed."""
        count = self.kv_len if self.sample is None else self.sample.shape[1]
        block = min(SUM_BLOCK, power_of_two(parts_of(count, MOST_SUMS), LEAST_SUM))
        blocks = parts_of(count, block)
        steps = parts_of(blocks, MOST_SUMS)
        return block, parts_of(blocks, steps) if self.weighs else 0, steps

    @property
    def sums_pad(self) -> int:
        """PARTS_PAD of the kernels, the same for all lengths, so that they compile once."""
        return power_of_two(MOST_SUMS)

    def fold(self, query: Tensor) -> int:
        """FOLD of `score_keys`."""
        *_, integer, _ = self.layout(query)
        return FOLD if integer and query.shape[1] <= 4 * self.dims.shape[0] else 1

    def scores(self, query: Tensor) -> tuple[int, int, int, dict[str, int]]:
        """Keys of a block of `score_keys`, blocks of a row, blocks of a program, and options of its launch."""
        block, programs, options = SCORE_BLOCK, SCORE_PROGRAMS, {}
        if self.packed.shape[3] * self.packed.element_size() * block > WIDE:
            block //= 2
        *_, native = self.layout(query)
        blocks = parts_of(self.kv_len, block)
        every = blocks * query.shape[0] * self.dims.shape[0]
        if native and self.fold(query) > 1 and every >= MANY_BLOCKS:
            programs, options = MANY_PROGRAMS, {"maxnreg": MANY_REGISTERS}
        return block, blocks, min(MOST_STEPS, parts_of(every, programs)), options


class Ranking(NamedTuple):
    """TIP's ranking of every key; a row is one key/value head of one batch row.

    Attributes:
        order: int32 [B * Hkv, >= T], integers in the order of the ranking.
        maxima: int32 [B * Hkv, tiles], the largest of each tile of ``order``; ``order`` for tiles of one key.
        bins: int32 [B * Hkv, BINS], a histogram of ``maxima``, and the number of valid keys.
        units: float32 [B * Hkv, G, N], the base-2 log-sum-exps of the parts of the sample, if weights are computed.
        masses: float32 [B * Hkv, M, G], sums of weights over all valid keys of M programs, if the call completes.
    """

    order: Tensor
    maxima: Tensor
    bins: Tensor
    units: Tensor
    masses: Tensor


class Listed(NamedTuple):
    """The first arguments of the kernel `select_keys`: keys that may be selected, and the budget.

    Attributes:
        keys: int32 [B * Hkv, 2 * order_stride + tiles], orders and slots of these keys, each in segments of a row.
        counts: int32 [B * Hkv, segments + 2], numbers of them, and the bounds of the threshold.
        bins: as of `Ranking`.
        slots: empty, int32 [B * Hkv, min(n_fac, T)].
        stride: columns of ``keys``.
        order_stride: columns of `Ranking.order`.
        segment: places of a segment.
        n_fac: as of `Tip`.
        share: as of `Tip`.
        width: columns of ``slots``.
        segments: segments of a row.
    """

    keys: Tensor
    counts: Tensor
    bins: Tensor
    slots: Tensor
    stride: int
    order_stride: int
    segment: int
    n_fac: int
    share: int
    width: int
    segments: int


def unit_and_mass(query: Tensor, tip: Tip) -> tuple[Tensor, Tensor]:
    """Empty ``units`` and ``masses`` of `Ranking`."""
    (kv_heads, _), batch = tip.dims.shape, query.shape[0]
    rows, group = batch * kv_heads, query.shape[1] // kv_heads
    _, blocks, steps, _ = tip.scores(query)
    programs = parts_of(blocks, steps) if tip.completes else 0
    units, masses = (
        torch.empty(rows, *shape, dtype=torch.float32, device=query.device)
        for shape in ((group, tip.sums[1]), (programs, group))
    )
    return units, masses


def ranked(query: Tensor, tip: Tip) -> Ranking:
    """Rank all keys for a query [B, Hq, 1, D], contiguous."""
    batch, query_heads, _, dim = query.shape
    kv_heads, kv_len, packed, capacity = tip.dims.shape[0], tip.kv_len, tip.packed, tip.capacity
    group, rows, (width, part, part_pad, integer, native) = query_heads // kv_heads, batch * kv_heads, tip.layout(query)
    units, masses = unit_and_mass(query, tip)
    block, blocks, steps, options = tip.scores(query)
    sum_block, parts, sum_steps = tip.sums
    integers: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    order = torch.empty(rows, blocks * block, **integers)
    maxima = order if tip.tile == 1 else torch.empty(rows, blocks * block // tip.tile, **integers)
    bins = (torch.empty if parts else torch.zeros)(rows, BINS.value, **integers)  # `sum_keys` empties the bins
    overlap, launch = overlapping(query.device)
    softcap, table = tip.softcap or 1.0, given_or(tip.table, query)
    weights, scales, shift = (given_or(each, query) for each in (tip.weights, tip.scales, tip.shift))
    inputs = query, tip.dims, weights, packed, scales, shift
    has = tip.scales is not None, tip.weights is not None, tip.shift is not None, tip.softcap is not None
    heads = power_of_two(group, 4 if integer else 8)
    if parts:
        sample = given_or(tip.sample, query)
        sum_keys[(parts, rows)](
            *inputs, tip.marks, sample, units, bins, table, kv_len if tip.sample is None else sample.shape[1],
            _stride(tip.marks), _stride(sample), capacity, sum_steps, tip.scaling, softcap,
            group, heads, dim, width, part, part_pad, sum_block, *has, tip.sample is not None,
            integer, native, tip.page, kv_heads, overlap, num_warps=SUM_WARPS, **launch,
        )  # fmt: skip
    score_keys[(parts_of(blocks, steps), rows)](
        *inputs, tip.marks, units, order, maxima, bins, masses, table, kv_len, _stride(tip.marks), capacity, blocks,
        steps, parts, tip.scaling, softcap, group, heads, tip.fold(query), dim, width, part, part_pad, block, tip.tile,
        tip.sums_pad, *has, tip.how, tip.completes, integer, native, SCORE_STAGES if block == SCORE_BLOCK else 2,
        tip.page, kv_heads, overlap, num_warps=SCORE_WARPS, **launch, **options,
    )  # fmt: skip
    return Ranking(order, maxima, bins, units, masses)


def listed(ranking: Ranking, tip: Tip) -> Listed:
    """List the keys that may be selected."""
    (rows, stride), tiles, tile = ranking.order.shape, ranking.maxima.shape[1], tip.tile
    segments = SEGMENTS if rows * SEGMENTS <= LIST_PROGRAMS else FEW_SEGMENTS
    span = parts_of(tiles, segments)
    block = min(LIST_TILES, power_of_two(span, FEW_TILES))
    keys, counts, slots = (
        torch.empty(rows, columns, dtype=torch.int32, device=ranking.order.device)
        for columns in (2 * stride + tiles, segments + 2, tip.width)
    )
    overlap, launch = overlapping(keys.device)
    list_keys[(segments + 1, rows)](
        *ranking[:3], keys, counts, stride, tiles, span, tip.n_fac, tip.share, tile, block, LIST_KEYS // tile, segments,
        overlap, num_warps=LIST_WARPS, **launch,
    )  # fmt: skip
    sizes = keys.shape[1], stride, span * tile, tip.n_fac, tip.share, tip.width
    return Listed(keys, counts, ranking.bins, slots, *sizes, segments)


def _stride(rows: Tensor) -> int:
    """Stride between the rows of a batch, 0 if they are one."""
    return 0 if rows.shape[0] == 1 else rows.stride(0)


def given_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or ``other`` in its place for an argument that the kernel does not read."""
    return other if tensor is None else tensor
