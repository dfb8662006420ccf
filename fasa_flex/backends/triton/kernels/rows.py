"""FASA-M: kernels that find and fetch the selected rows that are not on the device yet."""

from __future__ import annotations

import triton
import triton.language as tl

from fasa_flex.backends.triton.kernels.launching import begin


@triton.jit
def find_rows(
    slots, held, held_at, places, absent, scratch, length, wanted,
    WANTED_PAD: tl.constexpr, BOUNDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Assign every selected slot of one key/value head a place on the device: its own, or that of an unselected slot.

    ``held`` has the slots of the last step, ascending, and ``held_at`` their places; both are updated to this step's.
    ``absent`` is set to the slot if its row must be fetched, else to -1.
    """
    begin(OVERLAP)
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, WANTED_PAD)
    real = number < wanted
    slot = tl.load(slots + row * wanted + number, mask=real, other=-1)
    smaller = tl.zeros([WANTED_PAD], tl.int32)  # number of held slots below each slot, by binary search
    step = WANTED_PAD // 2
    while step > 0:
        probe = smaller + step
        there = tl.load(held + row * wanted + probe - 1, mask=probe <= wanted, other=2147483647)
        smaller = tl.where(there < slot, probe, smaller)
        step //= 2
    there = tl.load(held + row * wanted + smaller, mask=smaller < wanted, other=-1)
    found = (there == slot) & (slot >= 0)
    if BOUNDED:  # after a rewind the last token may have overwritten a held row
        found = found & (slot < tl.load(length) - 1)
    place = tl.load(held_at + row * wanted + smaller, mask=found, other=-1)
    before = tl.load(held_at + row * wanted + number, mask=real, other=0)
    # scratch passes data between threads: first marks of held rows selected again, then places of the others
    tl.store(scratch + row * wanted + number, 0, mask=real)
    tl.debug_barrier()
    tl.store(scratch + row * wanted + smaller, 1, mask=found)
    tl.debug_barrier()
    unused = real & (tl.load(scratch + row * wanted + number, mask=real, other=1) == 0)
    tl.debug_barrier()
    tl.store(scratch + row * wanted + tl.cumsum(unused.to(tl.int32), 0) - 1, before, mask=unused)
    tl.debug_barrier()
    new = real & ~found  # includes -1, so that places stay a permutation
    free = tl.load(scratch + row * wanted + tl.cumsum(new.to(tl.int32), 0) - 1, mask=new, other=0)
    place = tl.where(found, place, free)
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
    """Copy the absent rows of keys and values to their places; a piece is ``BLOCK`` rows of one key/value head."""
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
        value = tl.load(value_row + slot[:, None] * VALUE_STRIDE + value_dim[None, :], mask=value_real)
        tl.store(held_keys + place[:, None] * DIM + dim[None, :], key, mask=real)
        tl.store(held_values + place[:, None] * VALUE_DIM + value_dim[None, :], value, mask=value_real)
