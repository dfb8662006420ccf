"""What a decoded token adds to a cache: its key, its value and its packed key."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.kernels.launching import begin

_LEAST = tl.constexpr(6.103515625e-05)  # the smallest normal float16
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds half to even


@triton.jit(do_not_specialize=["length"])
def write_states(
    key, value, keys, values, packed, scales, dims, length, key_batch, key_head, value_batch, value_head, keys_batch,
    keys_head, values_batch, values_head, capacity,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    SCALED: tl.constexpr, COUNTED: tl.constexpr, KV_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write one key/value head's states behind the ``length`` tokens held; int8 as `fasa_flex.packing` converts.

    The length is a number, or where it is ``COUNTED`` on the device, a pointer to it.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(length) if COUNTED else tl.cast(length, tl.int64)
    tl.device_assert(slot < capacity, "a static cache is full")
    batch, head = row // KV_HEADS, row % KV_HEADS
    room = tl.where(slot < capacity, 1, 0)  # beyond the end no dimension is real, also where nothing checks assertions
    key += batch * key_batch + head * key_head
    dim, value_dim, place = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD), tl.arange(0, WIDTH_PAD)
    real = dim < DIM * room
    keys += batch * keys_batch + head * keys_head + slot * KEY_STRIDE
    tl.store(keys + dim, tl.load(key + dim, mask=real), mask=real)
    real = value_dim < VALUE_DIM * room
    values += batch * values_batch + head * values_head + slot * VALUE_STRIDE
    new = tl.load(value + batch * value_batch + head * value_head + value_dim, mask=real)
    tl.store(values + value_dim, new, mask=real)
    real, at = place < WIDTH * room, row * capacity + slot
    scored = tl.load(key + tl.load(dims + head * WIDTH + place, mask=real, other=0), mask=real, other=0)
    if SCALED:
        scored = scored.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(scored), 0), 127.0), _LEAST).to(tl.float16)
        tl.store(scales + at, scale, mask=room > 0)
        scored = (tl.div_rn(scored, scale.to(tl.float32)) + _ROUND) - _ROUND
        scored = tl.minimum(tl.maximum(scored, -127.0), 127.0)
    tl.store(packed + at * WIDTH + place, scored.to(packed.dtype.element_ty), mask=real)
