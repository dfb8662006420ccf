"""Scores of packed keys: a group's queries, the unpacking of four-bit codes, products, and logits."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

_LEAST = tl.constexpr(1e-30)
"""Less than the largest number of a query that matters."""


@triton.jit
def first_row(row, capacity, PAGE: tl.constexpr):
    """The row of packed keys from which `packed_row` counts: the head's first, or with ``PAGE`` the first of all."""
    return 0 if PAGE > 0 else row * capacity


@triton.jit
def packed_row(slot, table, row, capacity, PAGE: tl.constexpr, KV_HEADS: tl.constexpr):
    """The row of a key/value head's packed keys in slots, from `first_row` on.

    With ``PAGE``, their blocks are listed in ``table``, ``capacity`` for each batch row.
    """
    place = slot
    if PAGE > 0:  # Triton 3.6 compiles what follows a return in such a branch
        listed = tl.minimum(tl.maximum(slot, 0) // PAGE, capacity - 1)  # what is read of other slots is masked
        block = tl.load(table + (row // KV_HEADS) * capacity + listed)
        place = (block * KV_HEADS + row % KV_HEADS) * PAGE + slot % PAGE
    return place


@triton.jit
def capped(logits, softcap):
    """``softcap * tanh(logits / softcap)``."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))


@triton.jit
def _scoring_queries(
    query, dims, weights, row, FROM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    PART_PAD: tl.constexpr, WEIGHTED: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """A group's weighted queries in ``PART`` of the scored dimensions: [PART_PAD, HEADS]."""
    dim, head = tl.arange(0, PART_PAD), tl.arange(0, HEADS)
    place, real = (row % KV_HEADS) * WIDTH + FROM + dim, dim < PART
    place_of = query + (row * GROUP + head[None, :]) * DIM + tl.load(dims + place, mask=real, other=0)[:, None]
    queries = tl.load(place_of, mask=(head < GROUP)[None, :] & real[:, None], other=0)
    if WEIGHTED:  # rounded as in PyTorch
        weight = tl.load(weights + place, mask=real, other=0).to(queries.dtype)
        queries = (queries.to(tl.float32) * weight.to(tl.float32)[:, None]).to(queries.dtype)
    return queries


@triton.jit
def _largest(queries):
    """The bits of each head's largest absolute number, or of a NaN, which as a factor shows in all its scores."""
    return tl.max(queries.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _digits(queries, step, FOLD: tl.constexpr):
    """Queries [K, HEADS] in units of ``step`` as integers of two digits to the base 256, the higher ones first.

    ``FOLD`` keys are one row of a matrix product. Each has its own rows and columns in the result [FOLD * K, HEADS *
    FOLD * 2], and the others are 0, so that a thread of the tensor cores' result has all heads of a key.
    """
    scaled = queries.to(tl.float32) / step[None, :]
    number = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
    higher = (number + 128) >> 8
    digits = tl.join(higher, number - (higher << 8)).to(tl.int16)
    SIZE: tl.constexpr = queries.shape[0]
    HEADS: tl.constexpr = queries.shape[1]
    if FOLD > 1:
        own = tl.arange(0, FOLD)[:, None] == tl.arange(0, FOLD)[None, :]
        own = tl.reshape(own.to(tl.int16), (FOLD, 1, 1, FOLD, 1))
        digits = tl.reshape(digits, (1, SIZE, HEADS, 1, 2)) * own
    digits = tl.reshape(digits, (FOLD * SIZE, HEADS * FOLD * 2))
    return digits.to(tl.int8)  # Triton 3.6 and 3.7 refuse a reshaped operand of a product


@triton.jit
def both_queries(
    query, dims, weights, row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, PART_PAD: tl.constexpr, WEIGHTED: tl.constexpr, INTEGER: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """A group's queries for the low and for the high bits of a packed byte, and the factor of `dot_products`.

    Both queries are equal if a byte is one number. With ``INTEGER`` they are `_digits`; the unit of a head is then its
    largest number, divided by 32512. The factor [1, HEADS, 1] is this unit, and 1 for floats.
    """
    lower = _scoring_queries(
        query, dims, weights, row, 0, GROUP, HEADS, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
    )  # fmt: skip
    upper = lower
    if PART < WIDTH:
        upper = _scoring_queries(
            query, dims, weights, row, PART, GROUP, HEADS, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
        )  # fmt: skip
    factor = tl.full([HEADS], 1.0, tl.float32)
    if INTEGER:
        most = tl.maximum(_largest(lower), _largest(upper))
        most = tl.maximum(most.to(tl.float32, bitcast=True), _LEAST, propagate_nan=tl.PropagateNan.ALL)
        factor = most / 32512  # 127 * 256
        lower, upper = _digits(lower, factor, FOLD), _digits(upper, factor, FOLD)
        if PART < WIDTH:  # codes are unpacked times 16
            factor *= 0.0625
    return lower, upper, factor[None, :, None]


@triton.jit
def _unpacked(key, dtype: tl.constexpr):
    """The low and the high four-bit codes of bytes, as numbers."""
    return ((key & 15).to(tl.int8) - 8).to(dtype), ((key >> 4).to(tl.int8) - 8).to(dtype)


@triton.jit
def _unpacked_natively(key):
    """`_unpacked` to int8, times 16, four bytes at once: with its first bit flipped a code is a signed number."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low;
        shl.b32 low, $2, 4;
        lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a;
        lop3.b32 $0, low, 0xf0f0f0f0, 0x80808080, 0x6a;
        }""",
        "=r,=r,r",
        [key],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def dot_products(
    key, lower, upper, factor, WIDTH: tl.constexpr, PART: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr,
    INTEGER: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scores of packed keys before scale and shift: [N, HEADS, FOLD] of keys [N, K] and `both_queries`."""
    if INTEGER:
        if PART == WIDTH:
            digits = tl.dot(key, lower, out_dtype=tl.int32)
        else:
            if NATIVE:
                low, high = _unpacked_natively(key)
            else:
                low, high = _unpacked(key, tl.int8)
                low, high = low * 16, high * 16
            digits = tl.dot(low, lower, out_dtype=tl.int32)
            digits = tl.dot(high, upper, digits, out_dtype=tl.int32)
        first, second = tl.split(tl.reshape(digits, (key.shape[0], HEADS, FOLD, 2)))
        score = (first * 256 + second).to(tl.float32) * factor
    else:
        if PART == WIDTH:
            score = tl.dot(key.to(lower.dtype), lower, input_precision="ieee")
        else:
            low, high = _unpacked(key, lower.dtype)
            score = tl.dot(low, lower, input_precision="ieee")
            score = tl.dot(high, upper, score, input_precision="ieee")
        score = tl.reshape(score, (key.shape[0], HEADS, FOLD))
    return score


@triton.jit
def logits_of(
    score, factor, shift, scaling, softcap, SCALED: tl.constexpr, SHIFTED: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Base-2 logits of `dot_products`; ``factor`` and ``shift`` broadcast to ``score``."""
    if CAPPED or SHIFTED:
        if SCALED:
            score *= factor
        if SHIFTED:
            score += shift
        score *= scaling
        if CAPPED:
            score = capped(score, softcap)
        score *= _LOG2_E
    else:  # a product for each key instead of each query head
        score *= factor * (scaling * _LOG2_E)
    return score
