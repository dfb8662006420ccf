"""The exact selection, with ties to the lower slot.

The best K keys lie in the K tiles of best maximum (ties to the lower tile), so K tiles of 16 keys are searched and not
the whole cache; thresholds are found among the order-preserving integers of `fasa_flex.ranking`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.kernels.scoring import TILE


@triton.jit
def _best(values, wanted, low):
    """Which ``wanted`` of the values int32 are largest, equal ones in order, and a threshold that they reach.

    At least as many must reach ``low``. Every round counts what reaches two thresholds in (low, high], in 16 bits each,
    since the sum over the threads is what a round waits for. They enclose where a geometric fall of the counts puts the
    last one wanted, and in every second round they are the thirds, which bounds the rounds.
    """
    low, high = low.to(tl.int64), tl.max(values, 0).to(tl.int64)
    found, over, guessed = tl.sum((values >= low.to(tl.int32)).to(tl.int32), 0), 0, 0
    while (low < high) & (found != wanted):
        span = high - low + 1
        first, second = (span + 2) // 3, 2 * ((span + 2) // 3)
        guessed = 1 - guessed
        if guessed == 1:
            count = found.to(tl.float32)
            guess = span.to(tl.float32) * tl.log(count / wanted) / tl.log(count / (over + 0.5))
            first, second = (guess * 0.85).to(tl.int64), (guess * 1.15).to(tl.int64) + 1
        first = tl.minimum(tl.maximum(first, 1), span - 1)
        second = tl.minimum(tl.maximum(second, first), span - 1)
        one, two = (low + first).to(tl.int32), (low + second).to(tl.int32)
        counts = tl.sum(tl.where(values >= one, 1, 0) + tl.where(values >= two, 65536, 0), 0)
        over_one, over_two = counts & 65535, (counts >> 16) & 65535
        if over_two >= wanted:
            low, found = low + second, over_two
        elif over_one >= wanted:
            low, high, found, over = low + first, low + second - 1, over_one, over_two
        else:
            high, over = low + first - 1, over_one
    threshold = low.to(tl.int32)
    taken = values >= threshold
    if found > wanted:
        above, equal = values > threshold, values == threshold
        left = wanted - tl.sum(above.to(tl.int32), 0)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    return taken, threshold


@triton.jit
def _lower_bound(values, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """What at least ``GROUPS`` of ``COUNT`` values reach: each group has a maximum, and here is the least of these."""
    return tl.min(tl.max(tl.reshape(values, (COUNT // GROUPS, GROUPS)), 0), 0)


@triton.jit
def select_keys(
    order, maxima, tiles, slots, kv_len, wanted, TILES_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, SEARCH: tl.constexpr
):
    """The slots of one key/value head, ascending; -1 where no valid key is left."""
    row = tl.program_id(0).to(tl.int64)
    if SEARCH:
        count = (kv_len + TILE - 1) // TILE
        number = tl.arange(0, TILES_PAD)
        maximum = tl.load(maxima + row * count + number, mask=number < count, other=-2147483648)
        taken, low = _best(maximum, wanted, _lower_bound(maximum, TILES_PAD, WANTED_PAD))
        tl.store(tiles + row * WANTED_PAD + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken)
        tl.debug_barrier()  # the tiles are read by other threads than wrote them
        place = tl.arange(0, WANTED_PAD * TILE)
        searched = place // TILE < wanted
        slot = tl.load(tiles + row * WANTED_PAD + place // TILE, mask=searched, other=0) * TILE + place % TILE
        bits = tl.load(order + row * kv_len + slot, mask=searched & (slot < kv_len), other=-2147483648)
    else:
        slot = tl.arange(0, TILES_PAD * TILE)
        bits = tl.load(order + row * kv_len + slot, mask=slot < kv_len, other=-2147483648)
        low = _lower_bound(bits, TILES_PAD * TILE, WANTED_PAD)
    taken, low = _best(bits, wanted, low)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(slots + row * wanted + place, tl.where(bits > -2147483648, slot, -1), mask=taken)
