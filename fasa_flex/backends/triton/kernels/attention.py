"""Kernels of attention: parts of FAC, beside the selection or not, parts of dense attention, and their merge."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin_in_turn
from fasa_flex.backends.triton.kernels.products import (
    both_queries,
    capped,
    dot_products,
    first_row,
    logits_of,
    packed_row,
)
from fasa_flex.backends.triton.kernels.scoring import MOST, unit_of
from fasa_flex.backends.triton.kernels.selection import LISTED, select_keys

_SLICE = tl.constexpr(64)
"""Dimensions of the query that are multiplied by the completion's covariance at one time."""

_STEP = tl.constexpr(256)
"""Programs of `score_keys` whose sums of weights are read at one time."""


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
def _store_part(
    sums, results, best, total, kept, result, row, part, parts, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Store one of a row's ``parts``: largest logits, sums of exact and of estimated weights, and results."""
    head, value_dim = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
    place = row * parts + part
    tl.store(sums + place * 3 * GROUP + head, best, mask=head < GROUP)
    tl.store(sums + (place * 3 + 1) * GROUP + head, total, mask=head < GROUP)
    tl.store(sums + (place * 3 + 2) * GROUP + head, kept, mask=head < GROUP)
    place_of = results + (place * GROUP + head[:, None]) * VALUE_PAD + value_dim[None, :]
    tl.store(place_of, result, mask=(head < GROUP)[:, None])


@triton.jit(do_not_specialize=[*LISTED, "width", "span", "capacity", "stride", "parts"])
def attend_rows(
    listed, counts, bins, slots, listed_stride, order_stride, segment_width, n_fac, share, width,
    SEGMENTS: tl.constexpr, span, places, query, keys, values, sums, results, key_batch, key_head, value_batch,
    value_head, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, CAPPED: tl.constexpr,
    dims, weights, packed, scales, shift, units, table, capacity, stride, parts,
    WIDTH: tl.constexpr, PART: tl.constexpr, PART_PAD: tl.constexpr, PARTS_PAD: tl.constexpr, SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr,
    COMPLETES: tl.constexpr, CHUNK: tl.constexpr, SELECTS: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """FAC over ``span`` of a key/value head's ``width`` slots; `merge_parts` merges the parts.

    ``places`` has the rows of the selected keys and values, ``slots`` those of their packed keys; -1 for none. With
    ``SELECTS`` the kernel first selects its slots (`select_keys`), and ``places`` is ``slots``. With ``PAGE``,
    ``table`` has the blocks of both (`packed_row`), which are ``stride`` rows of keys and values apart.
    """
    row, part, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, GROUP_PAD)
    # all that is read before `begin_in_turn` is older than the results of the kernel before
    if COMPLETES:
        lower, upper, step = both_queries(
            query, dims, weights, row, GROUP, GROUP_PAD, 1, DIM, WIDTH, PART, PART_PAD, WEIGHTED, INTEGER, KV_HEADS
        )  # fmt: skip
        unit = unit_of(units, row, parts, PARTS_PAD, GROUP, GROUP_PAD)
    queries = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    first = part * span
    last = tl.minimum(first + span, width)
    begin_in_turn(OVERLAP)
    if SELECTS:
        select_keys(
            listed, counts, bins, slots, listed_stride, order_stride, segment_width, n_fac, share, width, SEGMENTS,
            first, last, CHUNK, False,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read the slots
    if COMPLETES:
        begun = first_row(row, capacity, PAGE)
        packed, scales = packed + begun * PART, scales + begun
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    kept = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        place = tl.load(places + row * width + number, mask=number < last, other=-1).to(tl.int64)
        if PAGE:
            block = tl.load(table + (row // KV_HEADS) * capacity + place // PAGE, mask=place >= 0, other=0)
            place = tl.where(place >= 0, block * stride + place % PAGE, -1)
        if COMPLETES:
            slot = tl.load(slots + row * width + number, mask=number < last, other=-1).to(tl.int64)
            real, dim = slot >= 0, tl.arange(0, PART_PAD)
            at = packed_row(slot, table, row, capacity, PAGE, KV_HEADS)
            key = tl.load(
                packed + at[:, None] * PART + dim[None, :],
                mask=real[:, None] & (dim < PART)[None, :],
                other=0,
            )
            factor, added = 1.0, 0.0
            if SCALED:
                factor = tl.load(scales + at, mask=real, other=0)
                factor = factor.to(tl.float32)[:, None]
            if SHIFTED:
                added = tl.load(shift + row * GROUP + head, mask=head < GROUP, other=0.0)[None, :]
            logits = dot_products(key, lower, upper, step, WIDTH, PART, GROUP_PAD, 1, INTEGER, NATIVE)
            logits = tl.reshape(logits, (BLOCK, GROUP_PAD))
            logits = logits_of(logits, factor, added, scaling, softcap, SCALED, SHIFTED, CAPPED) - unit[None, :]
            kept += tl.sum(tl.where(real[:, None], tl.exp2(tl.minimum(logits, MOST)), 0.0), 0)
        best, total, result = _attend_block(
            queries, keys, values, place, place >= 0, best, total, result, scaling, softcap,
            KEY_STRIDE, VALUE_STRIDE, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    _store_part(
        sums, results, best, total, kept, result, row, part, tl.num_programs(1), GROUP, GROUP_PAD, VALUE_PAD
    )  # fmt: skip


@triton.jit
def attend_part(
    query, keys, values, valid, sums, results, key_batch, key_head, value_batch, value_head, kv_len,
    valid_stride, span, scaling, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Dense attention of a group over one part of ``span`` keys; `merge_parts` merges the parts."""
    begin_in_turn(OVERLAP)  # `merge_parts` reads sinks before it waits
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = _queries(query, row, GROUP, GROUP_PAD, DIM, DIM_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    keys += (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
    values += (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
    for start in range(part * span, part * span + span, BLOCK):
        slot = start + tl.arange(0, BLOCK).to(tl.int64)
        real = tl.load(valid + (row // KV_HEADS) * valid_stride + slot, mask=slot < kv_len, other=0)
        best, total, result = _attend_block(
            queries, keys, values, slot, real != 0, best, total, result, scaling, softcap,
            KEY_STRIDE, VALUE_STRIDE, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAPPED,
        )  # fmt: skip
    _store_part(
        sums, results, best, total, total, result, row, part, tl.num_programs(0), GROUP, GROUP_PAD, VALUE_PAD
    )  # fmt: skip


@triton.jit
def _remainder(
    query, means, covariances, row, state, head, factor, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, FIRST_ORDER: tl.constexpr,
):  # fmt: skip
    """The unselected keys' estimated value, `fasa_flex.core.completion`, for one query head: [VALUE_PAD]."""
    value_dim = tl.arange(0, VALUE_PAD)
    result = tl.load(means + state * VALUE_DIM + value_dim, mask=value_dim < VALUE_DIM, other=0).to(tl.float32)
    if FIRST_ORDER:
        for first in tl.static_range(0, DIM_PAD, _SLICE if DIM_PAD > _SLICE else DIM_PAD):
            dim = first + tl.arange(0, _SLICE if DIM_PAD > _SLICE else DIM_PAD)
            own = tl.load(query + (row * GROUP + head) * DIM + dim, mask=dim < DIM, other=0).to(tl.float32) * factor
            place = covariances + (state * DIM + dim[:, None]) * VALUE_DIM + value_dim[None, :]
            covariance = tl.load(place, mask=(dim < DIM)[:, None] & (value_dim < VALUE_DIM)[None, :], other=0)
            own = own.to(covariance.dtype).to(tl.float32)  # rounded as in PyTorch
            result += tl.sum(own[:, None] * covariance.to(tl.float32), 0)
    return result


@triton.jit(do_not_specialize=["programs"])
def merge_parts(
    sums, results, sinks, out, parts, query, masses, means, covariances, covered, states, programs, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, SUNK: tl.constexpr, COMPLETES: tl.constexpr,
    FIRST_ORDER: tl.constexpr, PAGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Merge the parts of `attend_rows` or `attend_part` into one query head's attention, completed, beside a sink.

    The selected keys' share of the mass of all valid keys is that of `fasa_flex.core.completion.kept_share`. With
    ``PAGED``, ``states`` has the rows of the batch rows' completion states.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, value_dim = tl.arange(0, PARTS_PAD), tl.arange(0, VALUE_PAD)
    # all that is read before `begin_in_turn` is older than the results of the kernel before
    if COMPLETES:
        state = row
        if PAGED:
            state = tl.load(states + row // KV_HEADS) * KV_HEADS + row % KV_HEADS
        rest = _remainder(
            query, means, covariances, row, state, head, factor, GROUP, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, FIRST_ORDER
        )  # fmt: skip
        by_program = tl.zeros([_STEP], tl.float32)
        for start in range(0, programs, _STEP):
            program = start + tl.arange(0, _STEP)
            place = masses + (row * programs + program) * GROUP + head
            by_program += tl.load(place, mask=program < programs, other=0.0)
        mass = tl.sum(by_program, 0)
        covers = tl.load(covered + state) > 0
    if SUNK:
        sink = tl.load(sinks + (row % KV_HEADS) * GROUP + head).to(tl.float32)
    begin_in_turn(OVERLAP)
    place = (row * parts + part) * GROUP + head
    by_part = tl.load(
        results + place[:, None] * VALUE_PAD + value_dim[None, :], mask=(part < parts)[:, None], other=0.0
    )  # fmt: skip
    place = sums + (row * parts + part) * 3 * GROUP + head
    best = tl.load(place, mask=part < parts, other=float("-inf"))
    total = tl.load(place + GROUP, mask=part < parts, other=0.0)
    most = tl.max(best, 0)
    fade = tl.exp(best - tl.where(most == float("-inf"), 0.0, most))
    weight = tl.sum(total * fade, 0)
    result = tl.sum(by_part * fade[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    lse = most + tl.log(weight)
    if COMPLETES:
        kept = tl.sum(tl.load(place + 2 * GROUP, mask=part < parts, other=0.0), 0)
        share = kept / tl.where(mass > 0.0, mass, 1.0)
        share = tl.where((share > 1.0) | (mass <= 0.0) | (covers == 0), 1.0, share)
        result = share * result + (1.0 - share) * rest
        lse -= tl.log(share)
    if SUNK:
        result *= 1.0 / (1.0 + tl.exp(sink - lse))
    place = out + (row * GROUP + head) * VALUE_DIM + value_dim
    tl.store(place, result.to(out.dtype.element_ty), mask=value_dim < VALUE_DIM)
