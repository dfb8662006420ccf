"""The kernel of the exact selection, with ties to the lower slot.

The best K keys are in the K tiles of largest maximum (ties to the lower tile), so the kernel searches K tiles of 16
keys instead of the whole cache. It bisects for a threshold among the order-preserving integers of
`fasa_flex.core.ranking`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin
from fasa_flex.backends.triton.kernels.scoring import LOWEST, TILE

_LINE = tl.constexpr(16)


@triton.jit
def _number(taken, COUNT: tl.constexpr):
    """Inclusive cumulative sum of bool [COUNT], first within lines of 16, which few threads share."""
    lines = tl.reshape(taken.to(tl.int32), (COUNT // _LINE, _LINE))
    own = tl.sum(lines, 1)
    return tl.reshape(tl.cumsum(lines, 1) + (tl.cumsum(own, 0) - own)[:, None], (COUNT,))


@triton.jit
def _best(values, wanted, low, COUNT: tl.constexpr):
    """Mask of the ``wanted`` largest values int32 [COUNT], the first among equals, and a threshold that they reach.

    At least ``wanted`` values must reach ``low``. A round counts the values above two thresholds in (low, high], in 16
    bits each, so that one sum over the threads, the slow part, serves both. In turn they bracket the threshold that a
    geometric fall of the counts predicts, and are at a quarter and a half of the interval, since counts fall fast.
    """
    high = tl.max(values, 0)
    found, over, guessed = tl.sum((values >= low).to(tl.int32), 0), 0, 0
    while (low < high) & (found != wanted):
        gap = (high - low).to(tl.uint32, bitcast=True)  # up to 2**32 - 1
        first, second = (gap >> 2) + 1, (gap >> 1) + 1
        guessed = 1 - guessed
        if guessed == 1:
            count = found.to(tl.float32)
            guess = gap.to(tl.float32) * (tl.log2(count / wanted) / tl.log2(count / (over + 0.5)))
            first, second = (guess * 0.85).to(tl.uint32), tl.minimum(guess * 1.15, 4e9).to(tl.uint32) + 1
        second = tl.minimum(second, gap)
        first = tl.minimum(tl.maximum(first, 1), second)
        one, two = low + first.to(tl.int32, bitcast=True), low + second.to(tl.int32, bitcast=True)
        counts = tl.sum(tl.where(values >= one, 1, 0) + tl.where(values >= two, 65536, 0), 0)
        over_one, over_two = counts & 65535, (counts >> 16) & 65535
        if over_two >= wanted:
            low, found = two, over_two
        elif over_one >= wanted:
            low, high, found, over = one, two - 1, over_one, over_two
        else:
            high, over = one - 1, over_one
    taken = values >= low
    if found > wanted:
        above, equal = values > low, values == low
        left = wanted - tl.sum(above.to(tl.int32), 0)
        taken = above | (equal & (_number(equal, COUNT) <= left))
    return taken, low


@triton.jit
def _lower_bound(values, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """A bound that at least ``GROUPS`` of ``COUNT`` values reach: the smallest maximum of ``GROUPS`` groups."""
    return tl.min(tl.max(tl.reshape(values, (COUNT // GROUPS, GROUPS)), 0), 0)


@triton.jit
def select_keys(
    order, maxima, tiles, slots, order_stride, maxima_stride, wanted,
    TILES_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, SEARCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the selected slots of one key/value head, ascending, -1 if there are fewer valid keys.

    Rows of ``order`` and ``maxima`` are as long as their strides.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    KEYS: tl.constexpr = (WANTED_PAD if SEARCH else TILES_PAD) * TILE
    if SEARCH:
        number = tl.arange(0, TILES_PAD)
        maximum = tl.load(maxima + row * maxima_stride + number, mask=number < maxima_stride, other=LOWEST)
        taken, low = _best(maximum, wanted, _lower_bound(maximum, TILES_PAD, WANTED_PAD), TILES_PAD)
        tl.store(tiles + row * WANTED_PAD + _number(taken, TILES_PAD) - 1, number, mask=taken)
        tl.debug_barrier()  # other threads read the tiles
        number = tl.arange(0, WANTED_PAD)
        tile = tl.load(tiles + row * WANTED_PAD + number, mask=number < wanted, other=maxima_stride)
        slot = tl.reshape(tile[:, None] * TILE + tl.arange(0, TILE)[None, :], (KEYS,))
    else:
        slot = tl.arange(0, KEYS)
    bits = tl.load(order + row * order_stride + slot, mask=slot < order_stride, other=LOWEST)
    if not SEARCH:
        low = _lower_bound(bits, KEYS, WANTED_PAD)
    taken, low = _best(bits, wanted, low, KEYS)
    place = row * wanted + _number(taken, KEYS) - 1
    tl.store(slots + place, tl.where(bits > LOWEST, slot, -1), mask=taken)
