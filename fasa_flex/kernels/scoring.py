"""TIP and the group's ranking, and the maxima of tiles of keys that the selection searches."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.kernels.launching import begin

TILE = tl.constexpr(16)
"""Keys whose maximum is kept for the search."""

LOWEST, FIRST = tl.constexpr(-2147483648), tl.constexpr(2147483647)
"""The order of a key that may not be selected, and of one that is whatever its score."""


@triton.jit
def _rank_bits(scores):
    """Integers in the order of floats, as `fasa_flex.ranking.rank_keys` has them in its upper half."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FC00000, ordered)


@triton.jit
def _store_order(
    ranking, slot, row, block, codes, order, maxima, order_stride, maxima_stride, kv_len, code_stride,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the order of a whole block of keys, whether there are that many, and the maximum of every tile of them."""
    code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=slot < kv_len, other=0)
    bits = tl.where(code > 1, FIRST, _rank_bits(ranking))
    bits = tl.where(code > 0, bits, LOWEST)
    tl.store(order + row * order_stride + slot, bits)
    tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
    maximum = tl.max(tl.reshape(bits, (BLOCK // TILE, TILE)), 1)
    tl.store(maxima + row * maxima_stride + tile, maximum)


@triton.jit
def score_keys(
    query, dims, keys, scales, codes, scores, top, total, order, maxima, order_stride, maxima_stride, kv_len,
    code_stride, key_stride, blocks, scaling,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, HOW: tl.constexpr, KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TIP for a block of keys of one key/value head, and the group's ranking unless that needs all keys (softmax)."""
    begin(OVERLAP)
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, dim, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_PAD), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    if HOW == "softmax":  # on its way before the keys are waited for
        code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
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
        _store_order(
            ranking, slot, row, block, codes, order, maxima, order_stride, maxima_stride, kv_len, code_stride,
            KV_HEADS, BLOCK,
        )  # fmt: skip


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
    scores, top, total, codes, order, maxima, order_stride, maxima_stride, kv_len, code_stride, blocks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum of the group's attention weights for a block of keys."""
    begin(OVERLAP)
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
    _store_order(
        ranking, slot, row, block, codes, order, maxima, order_stride, maxima_stride, kv_len, code_stride,
        KV_HEADS, BLOCK,
    )  # fmt: skip
