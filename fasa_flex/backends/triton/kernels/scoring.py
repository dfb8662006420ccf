"""Kernels of TIP: scores, the group's ranking, the maxima of tiles for the selection, and log-sum-exps of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin

TILE = tl.constexpr(16)
"""Keys of a tile, whose maximum the selection searches first."""

LOWEST, FIRST = tl.constexpr(-2147483648), tl.constexpr(2147483647)
"""Orders of an invalid key, which is never selected, and of a forced one, which always is."""

VALID, FORCED, SAMPLED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
"""Bits of a key's code; forced and sampled keys are also valid."""

_STEP = tl.constexpr(256)


@triton.jit
def _rank_bits(scores):
    """Integers in the order of floats, the upper half of those of `fasa_flex.core.ranking.rank_keys`."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FC00000, ordered)


@triton.jit
def _store_order(
    ranking, code, slot, row, block, order, maxima, order_stride, maxima_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the order of a block of keys, LOWEST beyond the last key, and the maximum of each of its tiles."""
    bits = tl.where((code & FORCED) > 0, FIRST, _rank_bits(ranking))
    bits = tl.where((code & VALID) > 0, bits, LOWEST)
    tl.store(order + row * order_stride + slot, bits)
    tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
    maximum = tl.max(tl.reshape(bits, (BLOCK // TILE, TILE)), 1)
    tl.store(maxima + row * maxima_stride + tile, maximum)


@triton.jit
def capped(logits, softcap):
    """``softcap * tanh(logits / softcap)``."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))


@triton.jit
def _add_mass(logits, best, total):
    """Add logits [N, M] to M running log-sum-exps ``best + log(total)``; empty ones are (-inf, 0)."""
    higher = tl.maximum(best, tl.max(logits, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(best - shift) + tl.sum(tl.exp(logits - shift[None, :]), 0)


@triton.jit
def _store_mass(logits, taken, masses, row, block, blocks, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr):
    """Write the log-sum-exp of a block's ``taken`` keys for each query head of the group."""
    head = tl.arange(0, GROUP_PAD)
    nothing = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    best, total = _add_mass(tl.where(taken[:, None], logits, float("-inf")), nothing, tl.zeros([GROUP_PAD], tl.float32))
    tl.store(masses + (row * blocks + block) * GROUP + head, best + tl.log(total), mask=head < GROUP)


@triton.jit
def _whole_mass(masses, row, blocks, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr):
    """The log-sum-exp of each query head over all blocks of keys, float32 [GROUP_PAD]."""
    head = tl.arange(0, GROUP_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(0, blocks, _STEP):
        block = start + tl.arange(0, _STEP)
        place = masses + (row * blocks + block[:, None]) * GROUP + head[None, :]
        real = (block < blocks)[:, None] & (head < GROUP)[None, :]
        best, total = _add_mass(tl.load(place, mask=real, other=float("-inf")), best, total)
    return best + tl.log(total)


@triton.jit
def _scoring_queries(
    query, dims, weights, row, FROM: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    PART_PAD: tl.constexpr, WEIGHTED: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """A group's weighted queries in ``PART`` of the scored dimensions: [PART_PAD, GROUP_PAD]."""
    dim, head = tl.arange(0, PART_PAD), tl.arange(0, GROUP_PAD)
    at, real = (row % KV_HEADS) * WIDTH + FROM + dim, dim < PART
    place = query + (row * GROUP + head[None, :]) * DIM + tl.load(dims + at, mask=real, other=0)[:, None]
    queries = tl.load(place, mask=(head < GROUP)[None, :] & real[:, None], other=0)
    if WEIGHTED:  # rounded as in PyTorch
        weight = tl.load(weights + at, mask=real, other=0).to(queries.dtype)
        queries = (queries.to(tl.float32) * weight.to(tl.float32)[:, None]).to(queries.dtype)
    return queries


@triton.jit
def score_keys(
    query, dims, weights, keys, scales, shift, codes, logits, masses, sample, order, maxima, order_stride,
    maxima_stride, kv_len, code_stride, key_stride, blocks, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    PART_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr,
    CAPPED: tl.constexpr, HOW: tl.constexpr, SUMS: tl.constexpr, KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TIP for a block of keys of one key/value head, and the group's ranking unless that is a softmax over all keys.

    A packed key of ``WIDTH`` dimensions has ``PART`` elements, half as many with four bits. For a softmax or with
    ``SUMS`` the logits are written, and the block's log-sum-exps of sampled and of valid keys.
    """
    begin(OVERLAP)
    MIXED: tl.constexpr = HOW == "softmax" or HOW == "softmax_exact"
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, dim, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PART_PAD), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    # loaded before the keys, so that both loads overlap
    code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
    key = tl.load(
        keys + row * key_stride + slot[:, None] * PART + dim[None, :],
        mask=inside[:, None] & (dim < PART)[None, :],
        other=0,
        eviction_policy="evict_first",  # read once; the written scores should stay in the cache
    )
    queries = _scoring_queries(
        query, dims, weights, row, 0, GROUP, GROUP_PAD, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
    )  # fmt: skip
    if PART < WIDTH:
        upper = _scoring_queries(
            query, dims, weights, row, PART, GROUP, GROUP_PAD, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
        )  # fmt: skip
        low, high = (key & 15).to(tl.int8) - 8, (key >> 4).to(tl.int8) - 8
        score = tl.dot(low.to(queries.dtype), queries, input_precision="ieee")
        score = tl.dot(high.to(queries.dtype), upper, score, input_precision="ieee")
    else:
        score = tl.dot(key.to(queries.dtype), queries, input_precision="ieee")
    if SCALED:
        score *= tl.load(scales + row * (key_stride // PART) + slot, mask=inside, other=0).to(tl.float32)[:, None]
    if SHIFTED:
        score += tl.load(shift + row * GROUP + head, mask=member, other=0.0)[None, :]
    if MIXED or SUMS:
        logit = score * scaling
        if CAPPED:
            logit = capped(logit, softcap)
        place = logits + (row * kv_len + slot[:, None]) * GROUP + head[None, :]
        tl.store(place, logit, mask=inside[:, None] & member[None, :])
    if SUMS:
        _store_mass(logit, (code & VALID) > 0, masses, row, block, blocks, GROUP, GROUP_PAD)
    if HOW == "softmax":
        _store_mass(logit, (code & SAMPLED) > 0, sample, row, block, blocks, GROUP, GROUP_PAD)
    if not MIXED:
        if HOW == "mean":
            ranking = tl.sum(tl.where(member[None, :], score, 0.0), 1) / GROUP
        else:
            ranking = tl.max(tl.where(member[None, :], score, float("-inf")), 1)
            odd = tl.max((score != score).to(tl.int32), 1) > 0  # tl.max skips NaN, which has to rank first
            ranking = tl.where(odd, float("nan"), ranking)
        _store_order(ranking, code, slot, row, block, order, maxima, order_stride, maxima_stride, BLOCK)


@triton.jit
def mix_group(
    logits, masses, codes, order, maxima, order_stride, maxima_stride, kv_len, code_stride, blocks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, HOW: tl.constexpr, KV_HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The group's sum of attention weights for a block of keys, normalised by ``masses``; for "softmax" its logarithm.

    There the masses are those of a sample, which another key may exceed by far, so the sum itself could overflow.
    """
    begin(OVERLAP)
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
    norm = _whole_mass(masses, row, blocks, GROUP, GROUP_PAD)
    norm = tl.where(norm > float("-inf"), norm, 0.0)  # without keys, or with a NaN, which has to rank first
    log = tl.load(
        logits + (row * kv_len + slot[:, None]) * GROUP + head[None, :],
        mask=inside[:, None] & member[None, :],
        other=float("-inf"),
    )
    log -= norm[None, :]
    if HOW == "softmax":
        best = tl.max(log, 1)
        least = tl.where(best == float("-inf"), 0.0, best)
        ranking = least + tl.log(tl.sum(tl.exp(log - least[:, None]), 1))
    else:
        ranking = tl.sum(tl.exp(log), 1)
    _store_order(ranking, code, slot, row, block, order, maxima, order_stride, maxima_stride, BLOCK)


@triton.jit
def share_kept(
    logits, masses, slots, share, kv_len, wanted, blocks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The selected keys' share of the mass of all valid keys, as in `fasa_flex.core.completion.kept_share`."""
    begin(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.arange(0, GROUP_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(0, wanted, BLOCK):
        number = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + row * wanted + number, mask=number < wanted, other=-1)
        real = (slot >= 0)[:, None] & (head < GROUP)[None, :]
        place = logits + (row * kv_len + slot[:, None]) * GROUP + head[None, :]
        best, total = _add_mass(tl.load(place, mask=real, other=float("-inf")), best, total)
    whole = _whole_mass(masses, row, blocks, GROUP, GROUP_PAD)
    kept = tl.exp(best + tl.log(total) - whole)
    kept = tl.where((kept > 1.0) | (whole == float("-inf")), 1.0, kept)
    tl.store(share + row * GROUP + head, kept, mask=head < GROUP)
