"""One decode step on a GPU as five Triton kernels behind one operator: TIP, the group's ranking, the selection, FAC.

Inductor's kernels for the same step take 1.4 to 3.8 times as long on an H100 (evals/results/bench_op_cuda.json).
Nothing here waits for the host or allocates more than scores, and everything can be captured in a CUDA graph.

The selection is exact, with ties to the lower slot: the best K keys lie in the K tiles of best maximum (ties to the
lower tile), so K tiles of 32 keys are searched and not the whole cache; thresholds are found by bisection over the
order-preserving integers of `fasa_flex.ranking`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
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
    """Write the order of a block of keys, and the maximum of every 32 of them."""
    inside = slot < kv_len
    code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
    bits = tl.where(code > 1, 0x7FFFFFFF, _rank_bits(ranking))
    bits = tl.where(code > 0, bits, -2147483648)
    tl.store(order + row * kv_len + slot, bits, mask=inside)
    tile = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    count = (kv_len + 31) // 32
    tl.store(maxima + row * count + tile, tl.max(tl.reshape(bits, (BLOCK // 32, 32)), 1), mask=tile < count)


@triton.jit
def _score(
    query, keys, scales, codes, scores, top, total, order, maxima, kv_len, code_stride, key_stride, blocks, scaling,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, HOW: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """TIP for a block of keys of one key/value head, and the group's ranking unless that needs all keys (softmax)."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, dim, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_PAD), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    key = tl.load(
        keys + row * key_stride + slot[:, None] * WIDTH + dim[None, :],
        mask=inside[:, None] & (dim < WIDTH)[None, :],
        other=0,
    )
    asked = tl.load(
        query + row * GROUP * WIDTH + head[:, None] * WIDTH + dim[None, :],
        mask=member[:, None] & (dim < WIDTH)[None, :],
        other=0,
    )
    score = tl.dot(asked, tl.trans(key.to(asked.dtype)), input_precision="ieee")
    if SCALED:
        score *= tl.load(scales + row * (key_stride // WIDTH) + slot, mask=inside, other=0).to(tl.float32)[None, :]
    if HOW == "softmax":
        score *= scaling
        code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=inside, other=0)
        real = tl.where((code > 0)[None, :] & member[:, None], score, float("-inf"))
        best = tl.max(real, 1)
        weight = tl.sum(tl.exp(real - tl.where(best == float("-inf"), 0.0, best)[:, None]), 1)
        tl.store(top + (row * GROUP + head) * blocks + block, best, mask=member)
        tl.store(total + (row * GROUP + head) * blocks + block, weight, mask=member)
        place = scores + (row * GROUP + head)[:, None] * kv_len + slot[None, :]
        tl.store(place, score, mask=inside[None, :] & member[:, None])
    else:
        if HOW == "mean":
            ranking = tl.sum(tl.where(member[:, None], score, 0.0), 0) / GROUP
        else:
            ranking = tl.max(tl.where(member[:, None], score, float("-inf")), 0)
        _store_order(ranking, slot, row, block, codes, order, maxima, kv_len, code_stride, KV_HEADS, BLOCK)


@triton.jit
def _normalise(top, total, norm, blocks, BLOCKS_PAD: tl.constexpr):
    """The log-sum-exp of one query head from those of its blocks."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS_PAD)
    best = tl.load(top + row * blocks + block, mask=block < blocks, other=float("-inf"))
    weight = tl.load(total + row * blocks + block, mask=block < blocks, other=0.0)
    most = tl.max(best, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    tl.store(norm + row, most + tl.log(tl.sum(weight * tl.exp(best - most), 0)))


@triton.jit
def _mix(
    scores, norm, codes, order, maxima, kv_len, code_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """The logarithm of the group's mean attention weight (the summed one ranks alike) for a block of keys."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot, head = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUP_PAD)
    inside, member = slot < kv_len, head < GROUP
    log = tl.load(
        scores + (row * GROUP + head)[:, None] * kv_len + slot[None, :],
        mask=inside[None, :] & member[:, None],
        other=float("-inf"),
    )
    log -= tl.load(norm + row * GROUP + head, mask=member, other=0.0)[:, None]
    best = tl.max(log, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    ranking = best + tl.log(tl.sum(tl.exp(log - best[None, :]), 0))
    _store_order(ranking, slot, row, block, codes, order, maxima, kv_len, code_stride, KV_HEADS, BLOCK)


@triton.jit
def _best(values, real, wanted):
    """Which ``wanted`` of the values int32 are largest, equal ones in order; at least as many must be real."""
    low = tl.min(tl.where(real, values, 2147483647), 0)
    high = tl.max(tl.where(real, values, -2147483648), 0)
    found = tl.sum(real.to(tl.int32), 0)
    while (low < high) & (found != wanted):
        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
        count = tl.sum((real & (values >= middle)).to(tl.int32), 0)
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        found = tl.where(enough, count, found)
        high = tl.where(enough, high, middle - 1)
    taken = real & (values >= low)
    if found > wanted:
        above = real & (values > low)
        equal = real & (values == low)
        left = wanted - tl.sum(above.to(tl.int32), 0)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    return taken


@triton.jit
def _select(
    order, maxima, tiles, slots, kv_len, wanted, TILES_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, SEARCH: tl.constexpr
):
    """The slots of one key/value head, ascending; -1 where no valid key is left."""
    row = tl.program_id(0).to(tl.int64)
    if SEARCH:
        count = (kv_len + 31) // 32
        number = tl.arange(0, TILES_PAD)
        there = number < count
        maximum = tl.load(maxima + row * count + number, mask=there, other=-2147483648)
        taken = _best(maximum, there, wanted)
        tl.store(tiles + row * WANTED_PAD + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken)
        tl.debug_barrier()  # the tiles are read by other threads than wrote them
        place = tl.arange(0, WANTED_PAD * 32)
        tile = tl.load(tiles + row * WANTED_PAD + place // 32, mask=place // 32 < wanted, other=0)
        slot = tile * 32 + place % 32
        real = (place // 32 < wanted) & (slot < kv_len)
    else:
        slot = tl.arange(0, TILES_PAD * 32)
        real = slot < kv_len
    bits = tl.load(order + row * kv_len + slot, mask=real, other=-2147483648)
    taken = _best(bits, real, wanted)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(slots + row * wanted + place, tl.where(bits > -2147483648, slot, -1), mask=taken)


@triton.jit
def _attend(
    query, keys, values, slots, sinks, out, key_batch, key_head, value_batch, value_head, wanted, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr,
    CAPPED: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """FAC for the query heads of one key/value head."""
    row = tl.program_id(0).to(tl.int64)
    head, dim, value_dim = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    member = head < GROUP
    asked = tl.load(
        query + (row * GROUP + head[:, None]) * DIM + dim[None, :],
        mask=member[:, None] & (dim < DIM)[None, :],
        other=0,
    )
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    if SUNK:
        best = tl.load(sinks + (row % KV_HEADS) * GROUP + head, mask=member, other=0.0).to(tl.float32)
        total += 1.0
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(0, WANTED_PAD, BLOCK):
        number = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + row * wanted + number, mask=number < wanted, other=-1).to(tl.int64)
        real = slot >= 0
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
        total = total * fade + tl.sum(weights, 1)
        best = higher
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (row * GROUP + head[:, None]) * VALUE_DIM + value_dim[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=member[:, None] & (value_dim < VALUE_DIM)[None, :])


@torch.library.custom_op("fasa_flex::decode", mutates_args=())
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dims: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sparse decode step: scores, ranking, selection and attention of one query a row.

    Args:
        query: float [B, Hq, 1, D], contiguous.
        key: float [B, Hkv, T, D], rows contiguous; on the device, or pinned host memory (FASA-M), of which the kernel
            reads the selected rows.
        value: likewise, [B, Hkv, T, Dv].
        query_dims: float [B, Hkv, G, 2 * n_tip], the dominant dimensions of ``query``.
        packed: [B, Hkv, C, 2 * n_tip], contiguous, C >= T; a float dtype or int8.
        scales: float16 [B, Hkv, C] of int8 keys.
        codes: uint8 [B or 1, T], rows contiguous: 0 for an invalid key, 1 for a valid one, 2 for one that is forced in.
        n_fac: tokens; K tiles of 32 keys are searched in registers, so a few hundred.
        how: "softmax", "mean" or "max", over the group.
        scaling: of the softmax.
        softcap: of the logits, or None.
        sinks: float [Hq], or None.

    Returns:
        [B, Hq, 1, Dv]; zeros for a row without a valid key.
    """
    batch, kv_heads, kv_len, dim = key.shape
    group, width = query_dims.shape[2:]
    rows, wanted = batch * kv_heads, min(n_fac, kv_len)
    group_pad, block = max(16, triton.next_power_of_2(group)), 256
    blocks, tiles = triton.cdiv(kv_len, block), triton.cdiv(kv_len, TILE)

    def integers(columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.int32, device=query.device)

    order, maxima = integers(kv_len), integers(tiles)
    mixed = how == "softmax" and group > 1
    scores, top, total, norm = (
        torch.empty(rows, group, size if mixed else 0, device=query.device) for size in (kv_len, blocks, blocks, 1)
    )
    query_dims = query_dims.contiguous()
    code_stride = 0 if codes.shape[0] == 1 else codes.stride(0)
    _score[(blocks, rows)](
        query_dims, packed, codes if scales is None else scales, codes, scores, top, total, order, maxima, kv_len,
        code_stride, packed.stride(1), blocks, scaling, group, group_pad, width,
        max(16, triton.next_power_of_2(width)), block, scales is not None,
        how if mixed or how == "mean" else "max", kv_heads, num_warps=4,
    )  # fmt: skip
    if mixed:
        _normalise[(rows * group,)](top, total, norm, blocks, triton.next_power_of_2(blocks), num_warps=4)
        _mix[(triton.cdiv(kv_len, 1024), rows)](
            scores, norm, codes, order, maxima, kv_len, code_stride, group, triton.next_power_of_2(group), 1024,
            kv_heads, num_warps=4,
        )  # fmt: skip
    wanted_pad = max(16, triton.next_power_of_2(wanted))
    slots, chosen = integers(wanted), integers(wanted_pad)
    _select[(rows,)](
        order, maxima, chosen, slots, kv_len, wanted, triton.next_power_of_2(tiles), wanted_pad, tiles > wanted_pad,
        num_warps=8,
    )  # fmt: skip
    value_dim, block = value.shape[-1], min(128 if key.element_size() == 2 else 32, wanted_pad)
    out = torch.empty(batch, kv_heads * group, 1, value_dim, dtype=query.dtype, device=query.device)
    _attend[(rows,)](
        query, key, value, slots, query if sinks is None else sinks, out, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), wanted, scaling, softcap or 1.0, group, group_pad, dim, max(16, triton.next_power_of_2(dim)),
        value_dim, max(16, triton.next_power_of_2(value_dim)), wanted_pad, block, kv_heads,
        softcap is not None, sinks is not None, num_warps=4,
    )  # fmt: skip
    return out


@decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dims: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    n_fac: int,
    how: str,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])
