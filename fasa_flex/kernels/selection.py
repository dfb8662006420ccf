"""The exact selection, with ties to the lower slot.

The best K keys lie in the K tiles of best maximum (ties to the lower tile), so K tiles of 16 keys or a few more are
searched and not the whole cache; thresholds are found among the order-preserving integers of `fasa_flex.ranking`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.kernels.scoring import TILE


@triton.jit
def _best(values, wanted, most, low):
    """Which of the values int32 are largest, ``wanted`` to ``most`` of them, equal ones in order.

    At least ``wanted`` must reach ``low``. A round costs what summing over the threads takes, so it counts what reaches
    four thresholds in (low, high], in 16 bits each. They enclose where a geometric fall of the counts puts the last one
    wanted, and in every second round they are the fifths, which bounds the rounds.

    Returns:
        bool, the values taken; a threshold that they reach; their number.
    """
    low, high = low.to(tl.int64), tl.max(values, 0).to(tl.int64)
    found, over, guessed = tl.sum((values >= low.to(tl.int32)).to(tl.int32), 0), 0, 0
    aim = tl.sqrt(wanted.to(tl.float32) * most.to(tl.float32))
    while (low < high) & (found > most):
        span = high - low + 1
        fifth = (span + 4) // 5
        one, two, three, four = fifth, 2 * fifth, 3 * fifth, 4 * fifth
        guessed = 1 - guessed
        if guessed == 1:
            count = found.to(tl.float32)
            guess = span.to(tl.float32) * tl.log(count / aim) / tl.log(count / (over + 0.5))
            one, two = (guess * 0.6).to(tl.int64), (guess * 0.9).to(tl.int64)
            three, four = (guess * 1.1).to(tl.int64) + 1, (guess * 1.6).to(tl.int64) + 1
        one = low + tl.minimum(tl.maximum(one, 1), span - 1)
        two = tl.minimum(tl.maximum(low + two, one), high)
        three = tl.minimum(tl.maximum(low + three, two), high)
        four = tl.minimum(tl.maximum(low + four, three), high)
        lower = (values >= one.to(tl.int32)).to(tl.int32) + ((values >= two.to(tl.int32)).to(tl.int32) << 16)
        upper = (values >= three.to(tl.int32)).to(tl.int32) + ((values >= four.to(tl.int32)).to(tl.int32) << 16)
        counts = tl.sum(lower.to(tl.int64) + (upper.to(tl.int64) << 32), 0)
        over_one, over_two = (counts & 65535).to(tl.int32), ((counts >> 16) & 65535).to(tl.int32)
        over_three, over_four = ((counts >> 32) & 65535).to(tl.int32), ((counts >> 48) & 65535).to(tl.int32)
        if over_four >= wanted:
            low, found = four, over_four
        elif over_three >= wanted:
            low, high, found, over = three, four - 1, over_three, over_four
        elif over_two >= wanted:
            low, high, found, over = two, three - 1, over_two, over_three
        elif over_one >= wanted:
            low, high, found, over = one, two - 1, over_one, over_two
        else:
            high, over = one - 1, over_one
    threshold = low.to(tl.int32)
    taken = values >= threshold
    if found > most:
        above, equal = values > threshold, values == threshold
        left = most - tl.sum(above.to(tl.int32), 0)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    return taken, threshold, tl.minimum(found, most)


@triton.jit
def _lower_bound(values, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """What at least ``GROUPS`` of ``COUNT`` values reach: each group has a maximum, and here is the least of these."""
    return tl.min(tl.max(tl.reshape(values, (COUNT // GROUPS, GROUPS)), 0), 0)


@triton.jit
def select_keys(
    order, maxima, tiles, slots, kv_len, wanted, searched, TILES_PAD: tl.constexpr, WANTED_PAD: tl.constexpr,
    SEARCHED_PAD: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The slots of one key/value head, ascending, -1 where no valid key is left; ``searched`` tiles are read at most."""
    row = tl.program_id(0).to(tl.int64)
    if SEARCH:
        count = (kv_len + TILE - 1) // TILE
        number = tl.arange(0, TILES_PAD)
        maximum = tl.load(maxima + row * count + number, mask=number < count, other=-2147483648)
        taken, low, count = _best(maximum, wanted, searched, _lower_bound(maximum, TILES_PAD, WANTED_PAD))
        tl.store(tiles + row * SEARCHED_PAD + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken)
        tl.debug_barrier()  # the tiles are read by other threads than wrote them
        place = tl.arange(0, SEARCHED_PAD * TILE)
        real = place // TILE < count
        slot = tl.load(tiles + row * SEARCHED_PAD + place // TILE, mask=real, other=0) * TILE + place % TILE
        bits = tl.load(order + row * kv_len + slot, mask=real & (slot < kv_len), other=-2147483648)
    else:
        slot = tl.arange(0, TILES_PAD * TILE)
        bits = tl.load(order + row * kv_len + slot, mask=slot < kv_len, other=-2147483648)
        low = _lower_bound(bits, TILES_PAD * TILE, WANTED_PAD)
    taken, low, count = _best(bits, wanted, wanted, low)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(slots + row * wanted + place, tl.where(bits > -2147483648, slot, -1), mask=taken)
