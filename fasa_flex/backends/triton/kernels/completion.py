"""The kernel that updates the completion's state by whole blocks of a row's valid tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin


@triton.jit
def _slot_of(number, nth, kv_len):
    """The slot of a row's ``nth`` valid token, by bisection of ``number``, the valid tokens up to each slot."""
    low, high = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + kv_len
    while low < high:
        middle = (low + high) // 2
        before = tl.load(number + middle) < nth
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["kv_len", "written", "capacity"])
def cover_rows(
    covered, key_sum, value_sum, product, mean_value, covariance, keys, values, valid, number, table, states,
    key_batch, key_head, value_batch, value_head, valid_row, number_row, kv_len, written, capacity, stride,
    COVERED: tl.constexpr, SKIPPED: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    DIM: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`fasa_flex.core.completion.cover_blocks` of one key/value head; works only once in ``COVERED`` tokens.

    Takes ``PART`` of the key's dimensions at a time, as many as have registers for their products with values. With
    ``PAGE``, ``number`` has the number of tokens of each batch row, ``states`` the row of its state, and ``table`` its
    blocks, ``capacity`` in a row, which are ``stride`` rows of keys and values apart.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // KV_HEADS, row % KV_HEADS
    if PAGE:
        row = tl.load(states + batch) * KV_HEADS + head
        count = tl.load(number + batch)
    else:
        number += batch * number_row
        valid += batch * valid_row
        count = tl.load(number + kv_len - 1)
    target, done = count // COVERED * COVERED, tl.load(covered + row)
    rewound = done > count - written
    if rewound | (done != target):
        done = tl.where(rewound, 0, done)
        kept, nonempty = (
            tl.where(done > 0, 1, 0),
            tl.where(target > 0, 1, 0),
        )  # 0 masks an empty state
        first = tl.maximum(done, SKIPPED)  # new tokens are number first + 1 to target
        if PAGE:
            start, stop = first.to(tl.int32), target.to(tl.int32)
        else:
            start, stop = _slot_of(number, first + 1, kv_len), _slot_of(number, target, kv_len) + 1
        keys += batch * key_batch + head * key_head
        values += batch * value_batch + head * value_head
        value_dim = tl.arange(0, VALUE_PAD)
        value_real = value_dim < VALUE_DIM
        tokens = tl.maximum(target - SKIPPED, 1).to(tl.float32)
        total, mean = tl.zeros([VALUE_PAD], tl.float32), tl.zeros([VALUE_PAD], tl.float32)
        for part in range(PARTS):
            dim = part * PART + tl.arange(0, PART)
            real = dim < DIM
            total = tl.zeros([VALUE_PAD], tl.float32)
            own = tl.zeros([PART], tl.float32)
            outer = tl.zeros([PART, VALUE_PAD], tl.float32)
            for at in range(start, stop, BLOCK):
                slot = at + tl.arange(0, BLOCK)
                inside = slot < stop
                if PAGE:
                    new, block = inside, tl.load(table + batch * capacity + slot // PAGE, mask=inside, other=0)
                    slot = block * stride + slot % PAGE
                else:
                    nth = tl.load(number + slot, mask=inside, other=0)
                    new = (tl.load(valid + slot, mask=inside, other=0) > 0) & (nth > first) & (nth <= target)
                place = values + slot.to(tl.int64)[:, None] * VALUE_STRIDE + value_dim[None, :]
                value = tl.load(place, mask=new[:, None] & value_real[None, :], other=0)
                total += tl.sum(value.to(tl.float32), 0)
                if DIM > 0:
                    place = keys + slot.to(tl.int64)[:, None] * KEY_STRIDE + dim[None, :]
                    key = tl.load(place, mask=new[:, None] & real[None, :], other=0)
                    own += tl.sum(key.to(tl.float32), 0)
                    if key.dtype != value.dtype:
                        outer = tl.dot(
                            tl.trans(key.to(tl.float32)), value.to(tl.float32), outer, input_precision="ieee"
                        )  # fmt: skip
                    else:
                        outer = tl.dot(tl.trans(key), value, outer, input_precision="ieee")
            total += tl.load(value_sum + row * VALUE_DIM + value_dim, mask=value_dim < VALUE_DIM * kept, other=0.0)
            mean = total / tokens
            if DIM > 0:
                sums = key_sum + row * DIM + dim
                place = (row * DIM + dim)[:, None] * VALUE_DIM + value_dim[None, :]
                before = (dim < DIM * kept)[:, None] & value_real[None, :]
                own += tl.load(sums, mask=dim < DIM * kept, other=0.0)
                outer += tl.load(product + place, mask=before, other=0.0)
                tl.debug_barrier()  # other threads read the same sums
                tl.store(sums, own, mask=real)
                tl.store(product + place, outer, mask=real[:, None] & value_real[None, :])
                spread = (outer - own[:, None] * mean[None, :]) / tokens
                after = (dim < DIM * nonempty)[:, None] & value_real[None, :]
                tl.store(covariance + place, spread.to(covariance.dtype.element_ty), mask=after)
        tl.debug_barrier()
        place = row * VALUE_DIM + value_dim
        tl.store(value_sum + place, total, mask=value_real)
        tl.store(mean_value + place, mean.to(mean_value.dtype.element_ty), mask=value_dim < VALUE_DIM * nonempty)
        tl.store(covered + row, target)
