"""Kernels of TIP: the group's ranking, maxima of tiles and their histogram, and sums of attention weights."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin_in_turn
from fasa_flex.backends.triton.kernels.orders import BINS, FIRST, LOWEST, bin_of, order_of
from fasa_flex.backends.triton.kernels.products import both_queries, dot_products, first_row, logits_of, packed_row

_SMALL, _LARGE = tl.constexpr(8e-31), tl.constexpr(3e34)
"""Sums of weights, e^-69 and e^79, between which floats neither underflow nor overflow."""

MOST = tl.constexpr(115.0)
"""Largest base-2 logarithm of a weight, relative to the sample's mass, whose sums do not overflow (e^80)."""


_AGAIN = tl.constexpr(65536)
"""More than the keys of a program."""


@triton.jit
def _add_mass(logits, best, total):
    """Add base-2 logits [N, M] to M running log-sum-exps ``best + log2(total)``; empty ones are (-inf, 0)."""
    higher = tl.maximum(best, tl.max(logits, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(best - shift) + tl.sum(tl.exp2(logits - shift[None, :]), 0)


@triton.jit
def unit_of(units, row, parts, PARTS_PAD: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """The base-2 logarithm of the mass in ``parts`` of `sum_keys`: [HEADS], 0 without keys, inf for padding heads."""
    part, head = tl.arange(0, PARTS_PAD), tl.arange(0, HEADS)
    place = units + (row * GROUP + head[:, None]) * parts + part[None, :]  # parts next to each other are in one warp
    real = (part < parts)[None, :] & (head < GROUP)[:, None]
    logits = tl.load(place, mask=real, other=float("-inf"))
    best = tl.max(logits, 1)
    shift = tl.where(best == float("-inf"), 0.0, best)
    unit = best + tl.log2(tl.sum(tl.exp2(logits - shift[:, None]), 1))
    unit = tl.where(unit > float("-inf"), unit, 0.0)  # without keys, or with a NaN, which has to rank first
    return tl.where(head < GROUP, unit, float("inf"))


@triton.jit
def _summed_keys(
    keys, scales, marks, sample, table, row, number, ended, marks_stride, sample_stride, capacity,
    PART: tl.constexpr, PART_PAD: tl.constexpr, SCALED: tl.constexpr, SAMPLED: tl.constexpr, PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Packed keys [N, PART_PAD] by ``number``, below ``ended``, their scales [N], and whether they are summed [N]."""
    dim = tl.arange(0, PART_PAD)
    if SAMPLED:
        place = sample + (row // KV_HEADS) * sample_stride + number
        slot = tl.load(place, mask=number < ended, other=-1).to(tl.int32)
        real = slot >= 0
    else:
        slot = number
        real = tl.load(marks + (row // KV_HEADS) * marks_stride + slot, mask=number < ended, other=0) != 0
    place = packed_row(slot, table, row, capacity, PAGE, KV_HEADS)
    key = tl.load(keys + place[:, None] * PART + dim[None, :], mask=real[:, None] & (dim < PART)[None, :], other=0)
    factor = tl.full([number.shape[0]], 1.0, tl.float16)
    if SCALED:
        factor = tl.load(scales + place, mask=real, other=0)
    return key, factor, real


# a growing cache and longer tables would compile again
@triton.jit(do_not_specialize=["count", "marks_stride", "sample_stride", "capacity", "steps"])
def sum_keys(
    query, dims, weights, keys, scales, shift, marks, sample, units, bins, table, count, marks_stride, sample_stride,
    capacity, steps, scaling, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    PART_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr,
    CAPPED: tl.constexpr, SAMPLED: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr, PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The base-2 log-sum-exps of the logits of ``steps`` blocks of keys, for each query head of a group.

    The ``count`` keys are those in the list ``sample``, -1 for none, or with not ``SAMPLED`` all valid ones. The row's
    histogram ``bins`` is emptied.
    """
    begin_in_turn(OVERLAP)
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = first_row(row, capacity, PAGE)
    keys, scales = keys + first * PART, scales + first
    begun, number = part * steps * BLOCK, tl.arange(0, BLOCK)
    ended = tl.minimum(begun + steps * BLOCK, count)
    key, factor, real = _summed_keys(  # while the queries are loaded
        keys, scales, marks, sample, table, row, begun + number, ended, marks_stride, sample_stride, capacity,
        PART, PART_PAD, SCALED, SAMPLED, PAGE, KV_HEADS,
    )  # fmt: skip
    head = tl.arange(0, HEADS)
    lower, upper, step = both_queries(
        query, dims, weights, row, GROUP, HEADS, 1, DIM, WIDTH, PART, PART_PAD, WEIGHTED, INTEGER, KV_HEADS
    )  # fmt: skip
    added = 0.0
    if SHIFTED:
        added = tl.load(shift + row * GROUP + head, mask=head < GROUP, other=0.0)[None, :]
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in tl.range(begun, ended, BLOCK, num_stages=1):
        following = _summed_keys(
            keys, scales, marks, sample, table, row, start + BLOCK + number, ended, marks_stride, sample_stride,
            capacity, PART, PART_PAD, SCALED, SAMPLED, PAGE, KV_HEADS,
        )  # fmt: skip
        score = dot_products(key, lower, upper, step, WIDTH, PART, HEADS, 1, INTEGER, NATIVE)
        score = tl.reshape(score, (BLOCK, HEADS))
        scale = factor.to(tl.float32)[:, None]
        logits = logits_of(score, scale, added, scaling, softcap, SCALED, SHIFTED, CAPPED)
        best, total = _add_mass(tl.where(real[:, None], logits, float("-inf")), best, total)
        key, factor, real = following
    place = units + (row * GROUP + head) * tl.num_programs(0) + part
    tl.store(place, best + tl.log2(total), mask=head < GROUP)
    for start in range(part * BLOCK, BINS, tl.num_programs(0) * BLOCK):
        tl.store(bins + row * BINS + start + number, tl.zeros([BLOCK], tl.int32))


@triton.jit
def _mixed(logits, FAR: tl.constexpr):
    """Weights of base-2 logits [N, HEADS, FOLD], and a number [N, FOLD] in the order of their sum over the heads.

    Only with ``FAR`` a sum may lie beyond ``_SMALL`` and ``_LARGE``: weights are then limited to 2^115, and a number
    beyond the limits is the sum's logarithm, scaled to stay in order.
    """
    if FAR:
        best = tl.max(logits, 1)
        beyond = best - tl.minimum(tl.maximum(best, -MOST), MOST)
        weights = tl.exp2(tl.minimum(logits, MOST))
        total = tl.sum(tl.exp2(logits - beyond[:, None, :]), 1)
        log = beyond + tl.log2(total)
        number = tl.where(log < 8.0 - MOST, log, tl.where(log > MOST, log * 1e33, total))
    else:
        weights = tl.exp2(logits)
        number = tl.sum(weights, 1)
    return weights, number


@triton.jit
def _marks_of(marks, block, columns, BLOCK: tl.constexpr):
    """Marks of a block of keys: 1 for a valid one, 3 for a forced one, 0 for others."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(marks + slot, mask=slot < columns, other=0)


@triton.jit
def _rank_block(
    keys, scales, table, row, capacity, mark, order, maxima, lower, upper, step, added, unit, columns, block, scaling,
    softcap, sums, seen,
    GROUP: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    PART_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    CAPPED: tl.constexpr, HOW: tl.constexpr, SUMS: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr,
    FAR: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Rank a block of keys, read in the first ``columns`` slots: write their orders and the maximum of each tile.

    ``mark`` is of `_marks_of`. Returns ``sums`` plus the weights of the valid keys [BLOCK // FOLD, HEADS, FOLD], and
    ``seen`` [BLOCK] plus the number of valid keys, and ``_AGAIN`` for each for which ``FAR`` has to be set.
    """
    ROWS: tl.constexpr = BLOCK // FOLD
    slot, dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, FOLD * PART_PAD)
    inside, first = slot < columns, (block * ROWS + tl.arange(0, ROWS)) * FOLD
    at = dim if PART == PART_PAD else dim // PART_PAD * PART + dim % PART_PAD
    there = first[:, None] + (dim // PART_PAD)[None, :] < columns
    if PART < PART_PAD:
        there = there & (dim % PART_PAD < PART)[None, :]
    place = keys + packed_row(first, table, row, capacity, PAGE, KV_HEADS)[:, None] * PART + at[None, :]
    key = tl.load(place, mask=there, other=0, eviction_policy="evict_first")  # orders should stay in the cache
    factor = 1.0
    if SCALED:
        scale = tl.load(scales + packed_row(slot, table, row, capacity, PAGE, KV_HEADS), mask=inside, other=0)
        factor = tl.reshape(scale, (ROWS, 1, FOLD)).to(tl.float32)
    real = mark != 0
    seen += tl.where(real, 1, 0)
    score = dot_products(key, lower, upper, step, WIDTH, PART, HEADS, FOLD, INTEGER, NATIVE)
    if SUMS or HOW == "softmax":
        logits = logits_of(score, factor, added, scaling, softcap, SCALED, SHIFTED, CAPPED) - unit[None, :, None]
        weights, number = _mixed(logits, FAR)
        number = tl.reshape(number, (BLOCK,))
        if not FAR:
            near = (number < _LARGE) & ((number > _SMALL) | (HOW != "softmax"))
            seen += tl.where(real & ~near, _AGAIN, 0)
        if SUMS:
            sums += tl.where(tl.reshape(real.to(tl.int8), (ROWS, 1, FOLD)) > 0, weights, 0.0)
    if HOW == "softmax":
        bits = order_of(number) if FAR else number.to(tl.int32, bitcast=True)
    else:
        if SCALED:
            score *= factor
        if SHIFTED:
            score += added
        member = (tl.arange(0, HEADS) < GROUP)[None, :, None]
        if HOW == "mean":
            number = tl.sum(tl.where(member, score, 0.0), 1) / GROUP
        else:
            number = tl.max(tl.where(member, score, float("-inf")), 1)
            odd = tl.max((member & (score != score)).to(tl.int32), 1) > 0  # tl.max skips NaN, which has to rank first
            number = tl.where(odd, float("nan"), number)
        bits = order_of(tl.reshape(number, (BLOCK,)))
    bits = tl.where(mark > 1, FIRST, bits)
    bits = tl.where(real, bits, LOWEST)
    tl.store(order + slot, bits)
    if TILE > 1:
        tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
        tl.store(maxima + tile, tl.max(tl.reshape(bits, (BLOCK // TILE, TILE)), 1))
    return sums, seen


@triton.jit(do_not_specialize=["kv_len", "capacity", "blocks", "steps", "parts"])
def score_keys(
    query, dims, weights, keys, scales, shift, marks, units, order, maxima, bins, masses, table, kv_len, marks_stride,
    capacity, blocks, steps, parts, scaling, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, PART_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PARTS_PAD: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, CAPPED: tl.constexpr, HOW: tl.constexpr,
    SUMS: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr, PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TIP for ``steps`` blocks of keys of one key/value head, in one pass, and with ``SUMS`` the sums of their weights.

    A packed key of ``WIDTH`` dimensions has ``PART`` elements, half as many with four bits. For a softmax or with
    ``SUMS``, weights are relative to the mass in ``units`` (`sum_keys`). Keys far from it, beyond the range of a float,
    are ranked by a second pass over these blocks. With a ``TILE`` of 1, ``maxima`` is ``order``. Up to 15 slots behind
    the last key are read: there is room for a multiple of 16 keys, so that threads read several scales at once.
    """
    WEIGHS: tl.constexpr = SUMS or HOW == "softmax"
    if not WEIGHS:
        begin_in_turn(OVERLAP)
    row, program, head = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, HEADS)
    lower, upper, step = both_queries(
        query, dims, weights, row, GROUP, HEADS, FOLD, DIM, WIDTH, PART, PART_PAD, WEIGHTED, INTEGER, KV_HEADS
    )  # fmt: skip
    added = 0.0
    if SHIFTED:
        added = tl.load(shift + row * GROUP + head, mask=head < GROUP, other=0.0)[None, :, None]
    unit = tl.zeros([HEADS], tl.float32)
    if WEIGHS:  # the kernel before wrote the units alone, everything else is older
        begin_in_turn(OVERLAP)
        unit = unit_of(units, row, parts, PARTS_PAD, GROUP, HEADS)
    columns = (kv_len + 15) // 16 * 16
    first = first_row(row, capacity, PAGE) // 16 * 16  # no change, but the compiler sees the factor
    keys, scales = keys + first * PART, scales + first
    order += row * blocks * BLOCK
    maxima += row * blocks * (BLOCK // TILE)
    bins += row * BINS
    marks += (row // KV_HEADS) * marks_stride
    sums = tl.zeros([BLOCK // FOLD, HEADS, FOLD], tl.float32)
    seen = tl.zeros([BLOCK], tl.int32)
    begun, ended = program * steps, tl.minimum(program * steps + steps, blocks)
    mark = _marks_of(marks, begun, columns, BLOCK)
    for block in tl.range(begun, ended, num_stages=STAGES):
        following = _marks_of(marks, block + 1, columns, BLOCK)  # loaded while this block is scored
        sums, seen = _rank_block(
            keys, scales, table, row, capacity, mark, order, maxima, lower, upper, step, added, unit, columns, block,
            scaling, softcap, sums, seen, GROUP, HEADS, FOLD, WIDTH, PART, PART_PAD, BLOCK, TILE, SCALED, SHIFTED,
            CAPPED, HOW, SUMS, INTEGER, NATIVE, False, PAGE, KV_HEADS,
        )  # fmt: skip
        mark = following
    number, again = tl.sum(seen, 0), False
    if WEIGHS:
        again = number >= _AGAIN
    if again:
        sums = tl.zeros([BLOCK // FOLD, HEADS, FOLD], tl.float32)
        for block in tl.range(begun, ended, num_stages=1):
            mark = _marks_of(marks, block, columns, BLOCK)
            sums, seen = _rank_block(
                keys, scales, table, row, capacity, mark, order, maxima, lower, upper, step, added, unit, columns,
                block, scaling, softcap, sums, seen, GROUP, HEADS, FOLD, WIDTH, PART, PART_PAD, BLOCK, TILE, SCALED,
                SHIFTED, CAPPED, HOW, SUMS, INTEGER, NATIVE, True, PAGE, KV_HEADS,
            )  # fmt: skip
    tl.debug_barrier()  # other threads read the maxima
    for start in range(
        begun * (BLOCK // TILE), ended * (BLOCK // TILE), BLOCK
    ):  # in the loop above it would take longer
        tile = start + tl.arange(0, BLOCK)
        best = tl.load(maxima + tile, mask=tile < ended * (BLOCK // TILE), other=LOWEST)
        tl.atomic_add(bins + bin_of(best), 1, mask=best > LOWEST, sem="relaxed")
    tl.atomic_add(bins, number % _AGAIN, sem="relaxed")
    if SUMS:
        place = masses + (row * tl.num_programs(0) + program) * GROUP + head
        tl.store(place, tl.sum(tl.sum(sums, 2), 0), mask=head < GROUP)
