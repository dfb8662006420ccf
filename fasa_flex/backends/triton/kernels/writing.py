"""The kernel that writes a decoded token's key, value and packed key into a cache, or new tokens' into pages."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin

_LEAST = tl.constexpr(6.103515625e-05)  # the smallest normal float16
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds half to even


@triton.jit
def _scored(
    key, dims, mean_key, head, FROM: tl.constexpr, PART: tl.constexpr, PART_PAD: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, inside,
):  # fmt: skip
    """A key's ``PART`` scored dimensions less the mean key, rounded as in PyTorch: [PART_PAD]."""
    place = tl.arange(0, PART_PAD)
    real = place < PART * inside
    dim = tl.load(dims + head * WIDTH + FROM + place, mask=real, other=0)
    scored = tl.load(key + dim, mask=real, other=0)
    if CENTRED:
        mean = tl.load(mean_key + head * DIM + dim, mask=real, other=0).to(scored.dtype)
        scored = (scored.to(tl.float32) - mean.to(tl.float32)).to(scored.dtype)
    return scored


@triton.jit
def _scale(most, LEVELS: tl.constexpr):
    """The float16 scale of an integer key whose largest magnitude is ``most``."""
    return tl.maximum(tl.div_rn(most, LEVELS), _LEAST).to(tl.float16)


@triton.jit
def _coded(scored, scale, LEVELS: tl.constexpr):
    """The integer codes of a key, as floats."""
    rounded = (tl.div_rn(scored.to(tl.float32), scale.to(tl.float32)) + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(rounded, -LEVELS), LEVELS)


@triton.jit(do_not_specialize=["length"])
def write_states(
    key, value, keys, values, packed, scales, dims, mean_key, length, offsets,
    key_batch, key_head, value_batch, value_head, keys_batch, keys_head, values_batch, values_head, capacity, room,
    stride,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PART_PAD: tl.constexpr,
    SCALED: tl.constexpr, CENTRED: tl.constexpr, COUNTED: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write one key/value head's key, value and packed key after the cache's ``length`` tokens.

    There are ``capacity`` slots for keys and values, and ``room`` for packed keys.
    Integers are converted as in `fasa_flex.core.packed_keys`. A packed key of ``WIDTH`` dimensions has ``PART``
    elements, half as many with four bits. With ``COUNTED``, ``length`` is a pointer to a number on the device. With
    ``PAGE`` it points to the block of each batch row's token, ``offsets`` to its place in this; blocks are ``stride``
    rows of keys and values apart.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // KV_HEADS, row % KV_HEADS
    if PAGE:
        block, offset = tl.load(length + batch), tl.load(offsets + batch)
        slot, at = block * stride + offset, (block * KV_HEADS + head) * PAGE + offset
    else:
        slot = tl.load(length) if COUNTED else tl.cast(length, tl.int64)
        at = row * room + slot
    tl.device_assert(slot < capacity, "a static cache is full")
    inside = tl.where(slot < capacity, 1, 0)  # 0 masks all writes beyond the end, also without device assertions
    key += batch * key_batch + head * key_head
    dim, value_dim, place = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD), tl.arange(0, PART_PAD)
    real = dim < DIM * inside
    keys += batch * keys_batch + head * keys_head + slot * KEY_STRIDE
    tl.store(keys + dim, tl.load(key + dim, mask=real), mask=real)
    real = value_dim < VALUE_DIM * inside
    values += batch * values_batch + head * values_head + slot * VALUE_STRIDE
    new = tl.load(value + batch * value_batch + head * value_head + value_dim, mask=real)
    tl.store(values + value_dim, new, mask=real)
    scored = _scored(key, dims, mean_key, head, 0, PART, PART_PAD, DIM, WIDTH, CENTRED, inside)
    if SCALED:
        LEVELS: tl.constexpr = 127.0 if PART == WIDTH else 7.0
        most = tl.max(tl.abs(scored.to(tl.float32)), 0)
        if PART < WIDTH:
            upper = _scored(key, dims, mean_key, head, PART, PART, PART_PAD, DIM, WIDTH, CENTRED, inside)
            most = tl.maximum(most, tl.max(tl.abs(upper.to(tl.float32)), 0))
        scale = _scale(most, LEVELS)
        tl.store(scales + at, scale, mask=inside > 0)
        scored = _coded(scored, scale, LEVELS)
        if PART < WIDTH:
            low, high = (scored + 8.0).to(tl.int32), (_coded(upper, scale, LEVELS) + 8.0).to(tl.int32)
            scored = low | (high << 4)
    tl.store(packed + at * PART + place, scored.to(packed.dtype.element_ty), mask=place < PART * inside)
