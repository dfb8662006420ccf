"""FASA-M: the selected rows that the device does not hold yet cross from host memory, and no others."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin


@triton.jit
def find_rows(
    slots, held, held_at, places, absent, scratch, length, wanted,
    WANTED_PAD: tl.constexpr, BOUNDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Give every selected slot of one key/value head a place among the held rows: its own, or that of one not selected.

    ``held`` are the slots of the last step, ascending, and ``held_at`` their places; both become those of this step.
    ``absent`` gets the slot where a row must be fetched, and -1 elsewhere.
    """
    begin(OVERLAP)
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, WANTED_PAD)
    real = number < wanted
    slot = tl.load(slots + row * wanted + number, mask=real, other=-1)
    smaller = tl.zeros([WANTED_PAD], tl.int32)  # held slots that are, found bit by bit
    step = WANTED_PAD // 2
    while step > 0:
        probe = smaller + step
        there = tl.load(held + row * wanted + probe - 1, mask=probe <= wanted, other=2147483647)
        smaller = tl.where(there < slot, probe, smaller)
        step //= 2
    there = tl.load(held + row * wanted + smaller, mask=smaller < wanted, other=-1)
    found = (there == slot) & (slot >= 0)
    if BOUNDED:  # the last token was written just now, over what a longer cache may have held there
        found = found & (slot < tl.load(length) - 1)
    place = tl.load(held_at + row * wanted + smaller, mask=found, other=-1)
    before = tl.load(held_at + row * wanted + number, mask=real, other=0)
    # threads read here what others wrote: which held rows are selected again, then the places of those that are not
    tl.store(scratch + row * wanted + number, 0, mask=real)
    tl.debug_barrier()
    tl.store(scratch + row * wanted + smaller, 1, mask=found)
    tl.debug_barrier()
    unused = real & (tl.load(scratch + row * wanted + number, mask=real, other=1) == 0)
    tl.debug_barrier()
    tl.store(scratch + row * wanted + tl.cumsum(unused.to(tl.int32), 0) - 1, before, mask=unused)
    tl.debug_barrier()
    new = real & ~found  # with those of no slot, so that every place is given once
    given = tl.load(scratch + row * wanted + tl.cumsum(new.to(tl.int32), 0) - 1, mask=new, other=0)
    place = tl.where(found, place, given)
    tl.store(held + row * wanted + number, slot, mask=real)
    tl.store(held_at + row * wanted + number, place, mask=real)
    tl.store(places + row * wanted + number, tl.where(slot >= 0, place, -1), mask=real)
    tl.store(absent + row * wanted + number, tl.where(new, slot, -1), mask=real)


@triton.jit
def fetch_rows(
    keys, values, held_keys, held_values, absent, places, key_batch, key_head, value_batch, value_head, wanted,
    blocks, pieces,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Copy the absent rows of keys and values to their places; a piece is a block of one key/value head's rows."""
    begin(OVERLAP)
    dim, value_dim = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        row, number = (piece // blocks).to(tl.int64), (piece % blocks) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(absent + row * wanted + number, mask=number < wanted, other=-1).to(tl.int64)
        place = row * wanted + tl.load(places + row * wanted + number, mask=number < wanted, other=-1)
        key_row = keys + (row // KV_HEADS) * key_batch + (row % KV_HEADS) * key_head
        value_row = values + (row // KV_HEADS) * value_batch + (row % KV_HEADS) * value_head
        new = (slot >= 0)[:, None]
        real, value_real = new & (dim < DIM)[None, :], new & (value_dim < VALUE_DIM)[None, :]
        key = tl.load(key_row + slot[:, None] * KEY_STRIDE + dim[None, :], mask=real)
        value = tl.load(value_row + slot[:, None] * VALUE_STRIDE + value_dim[None, :], mask=value_real)  # as keys cross
        tl.store(held_keys + place[:, None] * DIM + dim[None, :], key, mask=real)
        tl.store(held_values + place[:, None] * VALUE_DIM + value_dim[None, :], value, mask=value_real)
