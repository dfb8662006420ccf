"""Kernels of attention: FAC over selected rows, selection and FAC in one kernel, and dense attention over all rows."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin
from fasa_flex.backends.triton.kernels.scoring import capped
from fasa_flex.backends.triton.kernels.selection import select_keys


@triton.jit
def _attend_block(
    queries, keys, values, slot, real, best, total, result, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Add the ``real`` keys and values at ``slot`` to a group's running softmax (``best``, ``total``, ``result``)."""
    dim, value_dim = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    key = tl.load(keys + slot[:, None] * KEY_STRIDE + dim[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0)
    logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scaling
    if CAPPED:
        logits = capped(logits, softcap)
    logits = tl.where(real[None, :], logits, float("-inf"))
    higher = tl.maximum(best, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights, fade = tl.exp(logits - shift[:, None]), tl.exp(best - shift)
    value = tl.load(
        values + slot[:, None] * VALUE_STRIDE + value_dim[None, :],
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
def _finish(
    out, masses, row, best, total, result,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Write a group's result, 0 if no key was real, and the log-sum-exps of its logits."""
    head, value_dim = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (row * GROUP + head[:, None]) * VALUE_DIM + value_dim[None, :]
    inside = (head < GROUP)[:, None] & (value_dim < VALUE_DIM)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    tl.store(masses + row * GROUP + head, best + tl.log(total), mask=head < GROUP)


@triton.jit
def attend_rows(
    slots, wanted, WANTED_PAD: tl.constexpr,
    query, keys, values, out, masses, key_batch, key_head, value_batch, value_head, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """FAC for the query heads of one key/value head."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    queries = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(0, WANTED_PAD, BLOCK):
        number = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + row * wanted + number, mask=number < wanted, other=-1).to(tl.int64)
        best, total, result = _attend_block(
            queries, keys, values, slot, slot >= 0, best, total, result, scaling, softcap,
            KEY_STRIDE, VALUE_STRIDE, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    _finish(out, masses, row, best, total, result, GROUP, GROUP_PAD, VALUE_DIM, VALUE_PAD)


@triton.jit
def focus_rows(
    order, maxima, tiles, slots, order_stride, maxima_stride, wanted,
    TILES_PAD: tl.constexpr, WANTED_PAD: tl.constexpr, SEARCH: tl.constexpr, GUESS: tl.constexpr,
    query, keys, values, out, masses, key_batch, key_head, value_batch, value_head, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Selection and FAC of one key/value head: `select_keys`, then `attend_rows`."""
    begin(OVERLAP)
    select_keys(
        order, maxima, tiles, slots, order_stride, maxima_stride, wanted, TILES_PAD, WANTED_PAD, SEARCH, GUESS, False
    )
    tl.debug_barrier()  # other threads read the slots
    attend_rows(
        slots, wanted, WANTED_PAD, query, keys, values, out, masses, key_batch, key_head, value_batch, value_head,
        scaling, softcap, KEY_STRIDE, VALUE_STRIDE, GROUP, GROUP_PAD, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, BLOCK,
        KV_HEADS, CAPPED, False,
    )  # fmt: skip


@triton.jit
def attend_part(
    query, keys, values, codes, bests, totals, results, key_batch, key_head, value_batch, value_head, kv_len,
    code_stride, span, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Dense attention of a group over one part of ``span`` keys; `merge_parts` merges the parts."""
    begin(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(part * span, part * span + span, BLOCK):
        slot = start + tl.arange(0, BLOCK).to(tl.int64)
        code = tl.load(codes + (row // KV_HEADS) * code_stride + slot, mask=slot < kv_len, other=0)
        best, total, result = _attend_block(
            queries, keys, values, slot, code > 0, best, total, result, scaling, softcap,
            KEY_STRIDE, VALUE_STRIDE, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    head, value_dim = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
    place = (row * tl.num_programs(0) + part) * GROUP + head
    tl.store(bests + place, best, mask=head < GROUP)
    tl.store(totals + place, total, mask=head < GROUP)
    tl.store(results + place[:, None] * VALUE_PAD + value_dim[None, :], result, mask=(head < GROUP)[:, None])


@triton.jit
def merge_parts(
    bests, totals, results, sinks, out, parts,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PARTS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr, SUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Merge the parts of `attend_part` into the attention of one query head."""
    begin(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, value_dim = tl.arange(0, PARTS_PAD), tl.arange(0, VALUE_PAD)
    place = (row * parts + part) * GROUP + head
    best = tl.load(bests + place, mask=part < parts, other=float("-inf"))
    most = tl.max(best, 0)
    if SUNK:
        sink = tl.load(sinks + (row % KV_HEADS) * GROUP + head).to(tl.float32)
        most = tl.maximum(most, sink)
    shift = tl.where(most == float("-inf"), 0.0, most)
    share = tl.exp(best - shift)
    total = tl.sum(tl.load(totals + place, mask=part < parts, other=0.0) * share, 0)
    if SUNK:
        total += tl.exp(sink - shift)
    place = results + place[:, None] * VALUE_PAD + value_dim[None, :]
    by_part = tl.load(place, mask=(part < parts)[:, None], other=0.0)
    result = tl.sum(by_part * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = out + (row * GROUP + head) * VALUE_DIM + value_dim
    tl.store(place, result.to(out.dtype.element_ty), mask=value_dim < VALUE_DIM)
