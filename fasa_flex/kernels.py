"""The Triton kernels of a decode step on a GPU: TIP, the group's ranking, the selection, FAC; and a dense layer's.

Inductor's kernels for the same step take 2.2 to 6.5 times as long on an H100 (evals/results/bench_op_cuda.json).
Nothing here waits for the host or allocates more than scores, and everything can be captured in a CUDA graph.

The selection is exact, with ties to the lower slot: the best K keys lie in the K tiles of best maximum (ties to the
lower tile), so K tiles of 16 keys are searched and not the whole cache; thresholds are found among the
order-preserving integers of `fasa_flex.ranking`.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(16)
"""Keys whose maximum is kept for the search."""


@triton.jit
def _rank_bits(scores):
    """Integers in the order of floats, as `fasa_flex.ranking.rank_keys` has them in its upper half."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FC00000, ordered)


@triton.jit
def _store_order(
    ranking, slot, row, block, codes, order, maxima, kv_len, code_stride, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the order of a block of keys, and the maximum of every tile of them."""
    inside = slot < kv_len
    code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
    bits = tl.where(code > 1, 0x7FFFFFFF, _rank_bits(ranking))
    bits = tl.where(code > 0, bits, -2147483648)
    tl.store(order + row * kv_len + slot, bits, mask=inside)
    tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
    count = (kv_len + TILE - 1) // TILE
    tl.store(maxima + row * count + tile, tl.max(tl.reshape(bits, (BLOCK // TILE, TILE)), 1), mask=tile < count)


@triton.jit
def score_keys(
    query, dims, keys, scales, codes, scores, top, total, order, maxima, kv_len, code_stride, key_stride, blocks,
    scaling, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, HOW: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """TIP for a block of keys of one key/value head, and the group's ranking unless that needs all keys (softmax)."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, dim, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_PAD), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    key = tl.load(
        keys + row * key_stride + slot[:, None] * WIDTH + dim[None, :],
        mask=inside[:, None] & (dim < WIDTH)[None, :],
        other=0,
        eviction_policy="evict_first",  # read once; what is written here is read again, from the cache
    )
    taken = tl.load(dims + (row % KV_HEADS) * WIDTH + dim, mask=dim < WIDTH, other=0)
    asked = tl.load(
        query + (row * GROUP + head[None, :]) * DIM + taken[:, None],
        mask=member[None, :] & (dim < WIDTH)[:, None],
        other=0,
    )
    score = tl.dot(key.to(asked.dtype), asked, input_precision="ieee")
    if SCALED:
        score *= tl.load(scales + row * (key_stride // WIDTH) + slot, mask=inside, other=0).to(tl.float32)[:, None]
    if HOW == "softmax":
        score *= scaling
        code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
        real = tl.where((code > 0)[:, None] & member[None, :], score, float("-inf"))
        best = tl.max(real, 0)
        weight = tl.sum(tl.exp(real - tl.where(best == float("-inf"), 0.0, best)[None, :]), 0)
        tl.store(top + (row * GROUP + head) * blocks + block, best, mask=member)
        tl.store(total + (row * GROUP + head) * blocks + block, weight, mask=member)
        place = scores + (row * kv_len + slot[:, None]) * GROUP + head[None, :]
        tl.store(place, score, mask=inside[:, None] & member[None, :])
    else:
        if HOW == "mean":
            ranking = tl.sum(tl.where(member[None, :], score, 0.0), 1) / GROUP
        else:
            ranking = tl.max(tl.where(member[None, :], score, float("-inf")), 1)
        _store_order(ranking, slot, row, block, codes, order, maxima, kv_len, code_stride, KV_HEADS, BLOCK)


@triton.jit
def _normaliser(top, total, row, blocks, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, STEP: tl.constexpr):
    """The log-sum-exp of a group's query heads, float32 [GROUP_PAD], from those of the blocks of keys."""
    head = tl.arange(0, GROUP_PAD)
    most = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(0, blocks, STEP):
        block = start + tl.arange(0, STEP)
        place = (row * GROUP + head)[:, None] * blocks + block[None, :]
        real = (head < GROUP)[:, None] & (block < blocks)[None, :]
        best = tl.load(top + place, mask=real, other=float("-inf"))
        part = tl.load(total + place, mask=real, other=0.0)
        higher = tl.maximum(most, tl.max(best, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = weight * tl.exp(most - shift) + tl.sum(part * tl.exp(best - shift[:, None]), 1)
        most = higher
    return tl.where(weight > 0.0, most + tl.log(weight), 0.0)


@triton.jit
def mix_group(
    scores, top, total, codes, order, maxima, kv_len, code_stride, blocks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """The sum of the group's attention weights for a block of keys."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    norm = _normaliser(top, total, row, blocks, GROUP, GROUP_PAD, 256)
    log = tl.load(
        scores + (row * kv_len + slot[:, None]) * GROUP + head[None, :],
        mask=inside[:, None] & member[None, :],
        other=float("-inf"),
    )
    ranking = tl.sum(tl.exp(log - norm[None, :]), 1)
    _store_order(ranking, slot, row, block, codes, order, maxima, kv_len, code_stride, KV_HEADS, BLOCK)


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


@triton.jit
def _attend_block(
    asked, keys, values, slot, real, best, total, result, scaling, softcap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Take the keys and values at ``slot`` into a group's running softmax, those that are ``real``."""
    dim, value_dim = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    key = tl.load(keys + slot[:, None] * DIM + dim[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0)
    logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
    if CAPPED:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    logits = tl.where(real[None, :], logits, float("-inf"))
    higher = tl.maximum(best, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights, fade = tl.exp(logits - shift[:, None]), tl.exp(best - shift)
    value = tl.load(
        values + slot[:, None] * VALUE_DIM + value_dim[None, :],
        mask=real[:, None] & (value_dim < VALUE_DIM)[None, :],
        other=0,
    )
    result = result * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total * fade + tl.sum(weights, 1), result


@triton.jit
def _queries(query, row, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """The queries of a group, [GROUP_PAD, DIM_PAD]."""
    head, dim = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    inside = (head < GROUP)[:, None] & (dim < DIM)[None, :]
    return tl.load(query + (row * GROUP + head[:, None]) * DIM + dim[None, :], mask=inside, other=0)


@triton.jit
def _begin(sinks, row, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, KV_HEADS: tl.constexpr, SUNK: tl.constexpr):
    """A group's running softmax before any key: its maximum and its sum, of a learned sink or of nothing."""
    head = tl.arange(0, GROUP_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    if SUNK:
        best = tl.load(sinks + (row % KV_HEADS) * GROUP + head, mask=head < GROUP, other=0.0).to(tl.float32)
        total += 1.0
    return best, total


@triton.jit
def _finish(
    out, row, total, result,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Write a group's result; 0 where no key was real."""
    head, value_dim = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (row * GROUP + head[:, None]) * VALUE_DIM + value_dim[None, :]
    inside = (head < GROUP)[:, None] & (value_dim < VALUE_DIM)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_rows(
    query, keys, values, slots, sinks, out, key_batch, key_head, value_batch, value_head, wanted, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr,
    CAPPED: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """FAC for the query heads of one key/value head."""
    row = tl.program_id(0).to(tl.int64)
    asked = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    best, total = _begin(sinks, row, GROUP, GROUP_PAD, KV_HEADS, SUNK)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(0, WANTED_PAD, BLOCK):
        number = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + row * wanted + number, mask=number < wanted, other=-1).to(tl.int64)
        best, total, result = _attend_block(
            asked, keys, values, slot, slot >= 0, best, total, result, scaling, softcap,
            DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    _finish(out, row, total, result, GROUP, GROUP_PAD, VALUE_DIM, VALUE_PAD)


@triton.jit
def attend_part(
    query, keys, values, codes, bests, totals, results, key_batch, key_head, value_batch, value_head, kv_len,
    code_stride, span, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Dense attention of a group to one part of its keys, ``span`` of them: what `merge_parts` makes one of."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    asked = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(part * span, part * span + span, BLOCK):
        slot = start + tl.arange(0, BLOCK).to(tl.int64)
        code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=slot < kv_len, other=0)
        best, total, result = _attend_block(
            asked, keys, values, slot, code > 0, best, total, result, scaling, softcap,
            DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    place = (row * tl.num_programs(0) + part) * GROUP_PAD + tl.arange(0, GROUP_PAD)
    tl.store(bests + place, best)
    tl.store(totals + place, total)
    tl.store(results + place[:, None] * VALUE_PAD + tl.arange(0, VALUE_PAD)[None, :], result)


@triton.jit
def merge_parts(
    bests, totals, results, sinks, out, parts,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """The attention of a group from that to the parts of its keys."""
    row = tl.program_id(0).to(tl.int64)
    best, total = _begin(sinks, row, GROUP, GROUP_PAD, KV_HEADS, SUNK)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    for part in range(0, parts):
        place = (row * parts + part) * GROUP_PAD + tl.arange(0, GROUP_PAD)
        other = tl.load(bests + place)
        higher = tl.maximum(best, other)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp(best - shift), tl.exp(other - shift)
        theirs = tl.load(results + place[:, None] * VALUE_PAD + tl.arange(0, VALUE_PAD)[None, :])
        result = result * fade[:, None] + theirs * share[:, None]
        total = total * fade + tl.load(totals + place) * share
        best = higher
    _finish(out, row, total, result, GROUP, GROUP_PAD, VALUE_DIM, VALUE_PAD)
