"""Kernels of the exact selection, with ties to the lower slot.

`score_keys` counts the maxima of tiles in a histogram by their leading bits. If K tiles reach the lower edge of a bin,
K keys do. So many programs list the keys that reach it, each those of one segment of a row: on random keys K and a few,
at most those of K tiles and of the tiles in one bin. `select_keys` bisects for the threshold among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin, begin_in_turn
from fasa_flex.backends.triton.kernels.orders import BINS, LOWEST, bin_reaching, budget_of, highest_in, lowest_in

_MOST, _HIGHEST = tl.constexpr(65535), tl.constexpr(2147483647)
"""The largest number in a part of 16 bits, and the largest integer."""

LISTED = ("listed_stride", "order_stride", "segment_width", "n_fac", "share")
"""Numbers of a row's list, which change with the length of a cache and need not be aligned."""


@triton.jit(do_not_specialize=["span", "n_fac", "share"])
def list_keys(
    order, maxima, bins, listed, counts, order_stride, tiles, span, n_fac, share,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SOME: tl.constexpr, SEGMENTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """List the keys of one segment, ``span`` tiles of a row, that may be selected, in the order of their slots.

    ``listed`` has a row of orders and a row of slots, in which segments have the places that they have in ``order``,
    and a row of tiles. Behind the ``counts`` of segments are the bounds of the threshold. The program after those of
    the segments finds the upper one: fewer than ``wanted`` keys are in the tiles beyond its bin.
    """
    begin_in_turn(OVERLAP)
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    order += row * order_stride
    maxima += row * tiles
    bins += row * BINS
    counts += row * (SEGMENTS + 2)
    begun = segment * span
    ended = tl.minimum(begun + span, tiles)
    listed += row * (2 * order_stride + tiles)
    some = listed + 2 * order_stride + begun
    listed += begun * TILE
    tile = begun + tl.arange(0, BLOCK)
    most = tl.load(maxima + tile, mask=tile < ended, other=LOWEST)  # while the bound is found
    wanted = budget_of(bins, n_fac, share)
    bound = bin_reaching(bins, wanted if segment < SEGMENTS else (wanted + TILE - 1) // TILE)
    low = tl.maximum(lowest_in(bound), LOWEST + 1)  # as many tiles, and so keys, reach it
    reaching = 0
    for start in tl.range(begun, ended, BLOCK, num_stages=1):
        taken = most >= low
        tl.store(some + reaching + tl.cumsum(taken.to(tl.int32), 0) - 1, tile, mask=taken)
        reaching += tl.sum(taken.to(tl.int32), 0)
        tile = start + BLOCK + tl.arange(0, BLOCK)
        most = tl.load(maxima + tile, mask=tile < ended, other=LOWEST)
    tl.debug_barrier()  # other threads read the tiles
    found = 0
    for start in range(0, reaching, SOME):
        number = start + tl.arange(0, SOME)
        first = tl.load(some + number, mask=number < reaching, other=0) * TILE
        slot = first[:, None] + tl.arange(0, TILE)[None, :]
        bits = tl.load(order + slot, mask=(number < reaching)[:, None], other=LOWEST)
        taken = bits >= low
        number = tl.cumsum(taken.to(tl.int32), 1)  # first within tiles, which few threads share
        by_tile = tl.sum(taken.to(tl.int32), 1)
        place = listed + found + (tl.cumsum(by_tile, 0) - by_tile)[:, None] + number - 1
        tl.store(place, bits, mask=taken)
        tl.store(place + order_stride, slot, mask=taken)
        found += tl.sum(by_tile, 0)
    tl.store(counts + segment, found, mask=segment < SEGMENTS)
    tl.store(counts + SEGMENTS, low, mask=segment == 0)
    tl.store(counts + SEGMENTS + 1, highest_in(bound), mask=segment == SEGMENTS)


@triton.jit
def _place_of(counts, number, width, SEGMENTS: tl.constexpr):
    """Places in a row's list of its keys by ``number``, and how many there are; a segment has ``width`` places."""
    place, total = number, 0
    for segment in tl.static_range(SEGMENTS):
        count = tl.load(counts + segment)
        total += count
        place += tl.where(number >= total, width - count, 0)
    return place, total


@triton.jit
def _first_places(counts, number, width, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr):
    """Places of a row's first ``CHUNK`` keys, whether a place holds a key, and the number of all keys.

    Where no segment has more keys than its share of the chunk, each fills the beginning of its share, so that no loop
    over the segments is needed. Elsewhere the places are `_place_of`.
    """
    PART: tl.constexpr = CHUNK // SEGMENTS
    count = tl.load(counts + tl.arange(0, SEGMENTS))
    total, most = tl.sum(count, 0), tl.max(count, 0)
    place, real = number // PART * width + number % PART, number % PART < tl.load(counts + number // PART)
    if most > PART:
        place, _ = _place_of(counts, number, width, SEGMENTS)
        real = number < total
    return place, real, total


@triton.jit
def _all_counts(bits, one, two, three, four):
    """For each of ``bits`` whether it reaches four orders, as 0 or 1 in four parts of 16 bits of an integer."""
    lower = (bits >= one).to(tl.int64) | ((bits >= two).to(tl.int64) << 16)
    return lower | ((bits >= three).to(tl.int64) << 32) | ((bits >= four).to(tl.int64) << 48)


@triton.jit
def _count(counts, NUMBER: tl.constexpr):
    """One of four numbers in an integer."""
    return ((counts >> (16 * NUMBER)) & _MOST).to(tl.int32)


@triton.jit
def _reaching(
    bits, listed, counts, total, width, one, two, three, four, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Numbers of listed keys that reach four orders; ``bits`` are the first ``CHUNK`` of them.

    Four numbers share an integer, and one sum over the threads, unless they could be too large for a part of it.
    """
    reaching = _all_counts(bits, one, two, three, four)
    for start in range(CHUNK, total, CHUNK):
        number = start + tl.arange(0, CHUNK)
        more = tl.load(listed + _place_of(counts, number, width, SEGMENTS)[0], mask=number < total, other=LOWEST)
        reaching += _all_counts(more, one, two, three, four)
    if total <= _MOST:
        every = tl.sum(reaching, 0)
        by_one, by_two, by_three, by_four = _count(every, 0), _count(every, 1), _count(every, 2), _count(every, 3)
    else:
        by_one, by_two = tl.sum(_count(reaching, 0), 0), tl.sum(_count(reaching, 1), 0)
        by_three, by_four = tl.sum(_count(reaching, 2), 0), tl.sum(_count(reaching, 3), 0)
    return by_one, by_two, by_three, by_four


@triton.jit
def _narrowed(low, high, found, over, order, count, wanted):
    """Bounds of the threshold, and numbers of keys at and above them, where ``count`` keys reach an ``order``."""
    reaches = count >= wanted
    return (
        tl.maximum(low, tl.where(reaches, order, LOWEST)), tl.minimum(high, tl.where(reaches, _HIGHEST, order - 1)),
        tl.minimum(found, tl.where(reaches, count, _HIGHEST)), tl.maximum(over, tl.where(reaches, 0, count)),
    )  # fmt: skip


@triton.jit
def _threshold(bits, listed, counts, total, width, wanted, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr):
    """The highest order that at least ``wanted`` of a row's listed keys reach, or one between it and the next key's.

    Also returns how many of the keys of just this order are selected. A round counts the keys that reach four orders in
    (low, high]; one sum over the threads, the slow part, serves all. Two bracket the threshold that a geometric fall of
    the counts predicts, two are at a quarter and a half of the interval, since counts fall fast: four rounds are usual.
    """
    low, high = tl.load(counts + SEGMENTS), tl.load(counts + SEGMENTS + 1)
    found, over, aim = total, 0, tl.log2(wanted.to(tl.float32))
    while (low < high) & (found != wanted):
        gap = (high - low).to(tl.uint32, bitcast=True)  # up to 2**32 - 1
        reached = tl.log2(found.to(tl.float32))
        guess = gap.to(tl.float32) * ((reached - aim) / (reached - tl.log2(over + 0.5)))
        guess = tl.minimum(guess, 3.8e9).to(tl.uint32)  # less than 2**32, with an eighth more
        one, two = tl.minimum(tl.maximum(guess - (guess >> 3), 1), gap), tl.minimum(guess + (guess >> 3) + 1, gap)
        one, two = low + one.to(tl.int32, bitcast=True), low + two.to(tl.int32, bitcast=True)
        three = low + ((gap >> 2) + 1).to(tl.int32, bitcast=True)
        four = low + tl.minimum((gap >> 1) + 1, gap).to(tl.int32, bitcast=True)
        by_one, by_two, by_three, by_four = _reaching(
            bits, listed, counts, total, width, one, two, three, four, CHUNK, SEGMENTS
        )  # fmt: skip
        low, high, found, over = _narrowed(low, high, found, over, one, by_one, wanted)
        low, high, found, over = _narrowed(low, high, found, over, two, by_two, wanted)
        low, high, found, over = _narrowed(low, high, found, over, three, by_three, wanted)
        low, high, found, over = _narrowed(low, high, found, over, four, by_four, wanted)
    equal = total
    if found > wanted:
        above = low + 1
        count, _, _, _ = _reaching(
            bits, listed, counts, total, width, above, above, above, above, CHUNK, SEGMENTS
        )  # fmt: skip
        equal = wanted - count
    return low, equal


@triton.jit(do_not_specialize=[*LISTED, "slots_stride", "begun", "ended"])
def select_keys(
    listed, counts, bins, slots, listed_stride, order_stride, segment_width, n_fac, share, slots_stride,
    SEGMENTS: tl.constexpr, begun, ended, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the slots number ``begun`` to ``ended`` that a key/value head selects, ascending; -1 if there are fewer."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    listed += row * listed_stride
    counts += row * (SEGMENTS + 2)
    slots += row * slots_stride
    number = tl.arange(0, CHUNK)
    place, real, total = _first_places(counts, number, segment_width, CHUNK, SEGMENTS)
    bits = tl.load(listed + place, mask=real, other=LOWEST)
    slot = tl.load(listed + order_stride + place, mask=real, other=-1)
    wanted = budget_of(bins + row * BINS, n_fac, share)
    low, equal = _threshold(bits, listed, counts, total, segment_width, wanted, CHUNK, SEGMENTS)
    selected, equals = 0, 0
    for start in range(0, total, CHUNK):
        if start > 0:
            number = start + tl.arange(0, CHUNK)
            place, _ = _place_of(counts, number, segment_width, SEGMENTS)
            bits = tl.load(listed + place, mask=number < total, other=LOWEST)
            slot = tl.load(listed + order_stride + place, mask=number < total, other=-1)
        taken = bits >= low
        if equal < total:  # the first of the keys at the threshold
            same = bits == low
            nth = equals + tl.cumsum(same.to(tl.int32), 0)
            taken = taken & ((nth <= equal) | (bits > low))
            equals += tl.sum(same.to(tl.int32), 0)
        rank = selected + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(slots + rank, slot, mask=taken & (rank >= begun) & (rank < ended))
        selected += tl.sum(taken.to(tl.int32), 0)
    for start in range(tl.maximum(selected, begun), ended, CHUNK):
        missing = start + tl.arange(0, CHUNK)
        tl.store(slots + missing, -1, mask=missing < ended)
