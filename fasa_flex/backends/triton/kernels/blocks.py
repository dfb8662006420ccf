"""The kernel of the prefill's estimate: attention between representatives of blocks, whose scores are never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin
from fasa_flex.backends.triton.kernels.products import capped


@triton.jit
def _logits(
    queries, key, start, stop, ends, scaling, softcap, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits of some representatives of keys for all rows, [ROWS_PAD, KEYS]; -inf for keys that a row does not see."""
    number, dim = start + tl.arange(0, KEYS), tl.arange(0, WIDTH_PAD)
    place = key + number[None, :].to(tl.int64) * WIDTH + dim[:, None]
    keys = tl.load(place, mask=(number < stop)[None, :] & (dim < WIDTH)[:, None], other=0.0)
    logits = tl.dot(queries, keys, input_precision="ieee") * scaling
    if CAPPED:
        logits = capped(logits, softcap)
    seen = (number < stop)[None, :] & (number[None, :] * STEP < ends[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def estimate_blocks(
    query, key, first, mass, first_stride, n_queries, n_keys, scaling, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr, ROWS_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, KEYS: tl.constexpr,
    STRONGEST: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`fasa_flex.prefill.estimators.attention_mass` of one block of queries, for ``TOGETHER`` query heads of a group.

    Reads the keys twice: for the log-sum-exp of each row, then for the sums of its weights by block.
    """
    begin(OVERLAP)
    m, some = n_queries - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # the longest rows first
    of_heads = GROUP // TOGETHER
    row_head = some // of_heads
    diagonal = (tl.load(first + row_head // HEADS * first_stride) + m).to(tl.int32)
    row, dim = tl.arange(0, ROWS_PAD), tl.arange(0, WIDTH_PAD)
    real, nth = row < TOGETHER * SPLIT, row % SPLIT
    place = ((some * TOGETHER + row // SPLIT) * n_queries + m) * SPLIT + nth
    places = query + place[:, None] * WIDTH + dim[None, :]
    queries = tl.load(places, mask=real[:, None] & (dim < WIDTH)[None, :], other=0.0)
    ends = diagonal * BLOCK + (nth + 1) * (BLOCK // SPLIT)
    stop = tl.minimum(n_keys, diagonal + 1) * PARTS
    key += row_head * n_keys * PARTS * WIDTH
    best, total = tl.full([ROWS_PAD], float("-inf"), tl.float32), tl.zeros([ROWS_PAD], tl.float32)
    for start in range(0, stop, KEYS):
        logits = _logits(
            queries, key, start, stop, ends, scaling, softcap, WIDTH, WIDTH_PAD, KEYS, BLOCK // PARTS, CAPPED
        )
        higher = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        best = higher
    lse = best + tl.log(total)
    mass += (some * n_queries + m) * n_keys
    for start in range(0, stop, KEYS):
        logits = _logits(
            queries, key, start, stop, ends, scaling, softcap, WIDTH, WIDTH_PAD, KEYS, BLOCK // PARTS, CAPPED
        )
        weights = tl.where(real[:, None], tl.exp(logits - lse[:, None]), 0.0)
        by_block = tl.sum(tl.reshape(weights, (ROWS_PAD, KEYS // PARTS, PARTS)), 2)
        block = start // PARTS + tl.arange(0, KEYS // PARTS)
        merged = tl.max(by_block, 0) if STRONGEST else tl.sum(by_block, 0) / (TOGETHER * SPLIT)
        tl.store(mass + block, merged, mask=block < n_keys)
