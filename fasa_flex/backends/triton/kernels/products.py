"""Scores of packed keys: a group's queries, the unpacking of four-bit codes, products, and logits."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def packed_row(slot, table, row, capacity, PAGE: tl.constexpr, KV_HEADS: tl.constexpr):
    """The row of a key/value head's packed keys in slots, in a buffer of ``capacity`` slots for each head.

    With ``PAGE``, their blocks are listed in ``table``, ``capacity`` for each batch row.
    """
    place = row * capacity + slot
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
def scoring_queries(
    query, dims, weights, row, FROM: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, PART_PAD: tl.constexpr, WEIGHTED: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """A group's weighted queries in ``PART`` of the scored dimensions: [FOLD * PART_PAD, FOLD * HEADS].

    ``FOLD`` keys are one row of a matrix product, so that the tensor cores compute no scores of padding heads: each key
    has its own rows and columns here, and the others are 0.
    """
    at, column = tl.arange(0, FOLD * PART_PAD), tl.arange(0, FOLD * HEADS)
    dim, head = at % PART_PAD, column % HEADS
    own = (at // PART_PAD)[:, None] == (column // HEADS)[None, :]
    place, real = (row % KV_HEADS) * WIDTH + FROM + dim, dim < PART
    place_of = query + (row * GROUP + head[None, :]) * DIM + tl.load(dims + place, mask=real, other=0)[:, None]
    queries = tl.load(place_of, mask=own & (head < GROUP)[None, :] & real[:, None], other=0)
    if WEIGHTED:  # rounded as in PyTorch
        weight = tl.load(weights + place, mask=real, other=0).to(queries.dtype)
        queries = (queries.to(tl.float32) * weight.to(tl.float32)[:, None]).to(queries.dtype)
    return queries


@triton.jit
def both_queries(
    query, dims, weights, row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, PART_PAD: tl.constexpr, WEIGHTED: tl.constexpr, NATIVE: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """`scoring_queries` for the low and for the high bits of a packed byte; equal if a byte is one number."""
    lower = scoring_queries(
        query, dims, weights, row, 0, GROUP, HEADS, FOLD, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
    )  # fmt: skip
    upper = lower
    if PART < WIDTH:
        upper = scoring_queries(
            query, dims, weights, row, PART, GROUP, HEADS, FOLD, DIM, WIDTH, PART, PART_PAD, WEIGHTED, KV_HEADS
        )  # fmt: skip
        if NATIVE:  # the high code is unpacked times 16
            lower, upper = lower.to(tl.float16), (upper.to(tl.float32) * 0.0625).to(tl.float16)
    return lower, upper


@triton.jit
def _unpacked(key, dtype: tl.constexpr):
    """The low and the high four-bit codes of bytes, as numbers."""
    return ((key & 15).to(tl.int8) - 8).to(dtype), ((key >> 4).to(tl.int8) - 8).to(dtype)


@triton.jit
def _unpacked_natively(key):
    """`_unpacked` to float16, the high code times 16, four bytes at once.

    The bits of a code become the last bits of a float16 number from 1024 on, from which that offset is subtracted.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, second, low, high;
        prmt.b32 first, $4, 0, 0x4140;
        prmt.b32 second, $4, 0, 0x4342;
        mov.b32 low, 0x64086408;
        mov.b32 high, 0x64806480;
        lop3.b32 $0, first, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, second, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $2, first, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $3, second, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 $0, $0, low;
        sub.f16x2 $1, $1, low;
        sub.f16x2 $2, $2, high;
        sub.f16x2 $3, $3, high;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [key],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def dot_products(key, lower, upper, WIDTH: tl.constexpr, PART: tl.constexpr, NATIVE: tl.constexpr):
    """Scores of packed keys before scale and shift: [N, M] of keys [N, K] and `both_queries` [K, M]."""
    if PART == WIDTH:
        score = tl.dot(key.to(lower.dtype), lower, input_precision="ieee")
    else:
        low, high = _unpacked_natively(key) if NATIVE else _unpacked(key, lower.dtype)
        score = tl.dot(low, lower, input_precision="ieee")
        score = tl.dot(high, upper, score, input_precision="ieee")
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
