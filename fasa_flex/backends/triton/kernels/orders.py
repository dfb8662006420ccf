"""Orders, the integers by which keys are selected, and the histogram of their leading bits."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST, FIRST = tl.constexpr(-2147483648), tl.constexpr(2147483646)
"""Orders of an invalid key, which is never selected, and of a forced one, which always is. There is a larger integer,
since `select_keys` counts the keys above its threshold."""

BINS = tl.constexpr(4096)
"""Bins of a row's histogram: sign, exponent and three bits of a float's fraction. No valid key falls in the first one,
which has the number of valid keys instead."""

_ROW = tl.constexpr(64)
"""Bins of a row of the histogram, the square root of all."""

_BITS, _SPAN = tl.constexpr(20), tl.constexpr(1 << 20)
"""Bits of an order that its bin leaves open, and orders of a bin."""


@triton.jit
def order_of(scores):
    """Integers in the order of floats, the upper half of those of `fasa_flex.core.ranking.rank_keys`."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FC00000, ordered)


@triton.jit
def bin_of(order):
    """The bin of an order."""
    return (order >> _BITS) + BINS // 2


@triton.jit
def bin_reaching(bins, wanted):
    """The highest bin of a row's histogram which, with those above it, has at least ``wanted`` of what is counted.

    The bins are summed in rows first, then those of one row: a scan of all takes many more registers.
    """
    place = tl.arange(0, _ROW)
    by_row = tl.sum(tl.load(bins + place[:, None] * _ROW + place[None, :]), 1)
    reached = tl.cumsum(by_row, 0, reverse=True)
    both = tl.sum(tl.where(reached >= wanted, 1 << 32, by_row.to(tl.int64)), 0)  # the rows that reach, what is above
    row, above = (both >> 32).to(tl.int32) - 1, both.to(tl.int32)
    reached = tl.cumsum(tl.load(bins + row * _ROW + place), 0, reverse=True) + above
    return row * _ROW + tl.sum((reached >= wanted).to(tl.int32), 0) - 1


@triton.jit
def lowest_in(number):
    """The lowest order in a bin."""
    return (number - BINS // 2) * _SPAN


@triton.jit
def highest_in(number):
    """The highest order in a bin."""
    return lowest_in(number) + (_SPAN - 1)


@triton.jit
def budget_of(bins, n_fac, share):
    """The number of keys that a row selects: ``n_fac``, or ``share`` trillionths of its valid keys if these are fewer.

    A share is rounded up, as in `fasa_flex.core.budget`; ``bins`` is the row's histogram.
    """
    trillionths = tl.load(bins).to(tl.int64) * share + 999999999999
    return tl.minimum(trillionths // 1000000000000, n_fac).to(tl.int32)
