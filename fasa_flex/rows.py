"""The selected rows of keys and values, fetched from where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.realize import compute_once


def take_rows(states: Tensor, slots: Tensor) -> Tensor:
    """Rows of keys or values, on the device of ``slots``.

    One `index_select` over all heads, two to three times as fast as advanced indexing, where the states are the first
    of a buffer's slots. Rows in host memory (FASA-M) are gathered there, so that nothing else crosses.

    Args:
        states: float [B, H, T, D].
        slots: int64 [B, H, G, Q, K].

    Returns:
        [B, H * G * Q, K, D].
    """
    device = slots.device
    if states.device != device:
        slots = slots.to(states.device)
    batch, heads, _, dim = states.shape
    if _is_buffer(states):
        table, index = _table(states, slots)
        rows = table.index_select(0, index.flatten())
    else:
        b = torch.arange(batch, device=slots.device).view(-1, 1, 1, 1, 1)
        rows = states[b, torch.arange(heads, device=slots.device).view(-1, 1, 1, 1), slots]
    return rows.view(batch, -1, slots.shape[-1], dim).to(device)


def dot_rows(query: Tensor, rows: Tensor) -> Tensor:
    """Dot products of queries [B, H, M, D] with rows [B, H, K, D]: [B, H, M, K], summed in float32 at least.

    Compiled for CPU they are one kernel with the fetch of the rows, of which no buffer is made.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, rows = query.to(wide), rows.to(wide)
        if torch.compiler.is_compiling() and query.device.type == "cpu":
            products: Tensor = compute_once(query)[:, :, :, None] * rows[:, :, None]
            return products.sum(-1)
        return query @ rows.mT


def weigh_rows(weights: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """Sums of the selected rows, on CPU without a buffer of them: pages that are new cost more than what they hold.

    Args:
        weights: [B, H * G * Q, M, K], in the dtype of ``states``.
        states: float [B, H, T, D].
        slots: int64 [B, H, G, Q, K].

    Returns:
        [B, H * G * Q, M, D].
    """
    if slots.device.type != "cpu":
        return weights @ take_rows(states, slots)
    batch, count, _, width = weights.shape
    if _is_buffer(states) and states.stride(2) == states.shape[3]:
        table, index = _table(states, slots)
    else:  # of a table with gaps embedding_bag makes a copy
        table = take_rows(states, slots).flatten(0, 2)
        index = torch.arange(len(table))
    bags = index.view(batch, count, 1, width).expand_as(weights)
    sums = F.embedding_bag(bags.reshape(-1, width), table, mode="sum", per_sample_weights=weights.reshape(-1, width))
    return sums.view(*weights.shape[:3], -1)


def _is_buffer(states: Tensor) -> bool:
    """Whether states [B, H, T, D] are the first slots of every head in a buffer [B, H, C, ..], at a distance or not."""
    row = states.stride(2)
    if row != states.shape[3] and torch.compiler.is_compiling():
        return False  # the compiler may hold a tensor with gaps as one without, once it was written to
    return _capacity(states) >= states.shape[2]


def _table(states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer's rows as they lie, float [.., D], and where in them the slots [B, H, G, Q, K] are: int64."""
    batch, heads, kv_len, dim = states.shape
    capacity = _capacity(states)
    first = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1, 1, 1) * capacity
    count = (batch * heads - 1) * capacity + kv_len
    return states.as_strided((count, dim), (states.stride(2), 1)), slots + first


def whole_buffer(states: Tensor) -> Tensor:
    """The buffer [B, H, C, D] of which ``states`` [B, H, T, D] are the first slots, or the states where they are none.

    What lies behind the states is not to be used; a graph compiled for the buffer serves until it is full.
    """
    batch, heads, kv_len, dim = states.shape
    capacity = _capacity(states)
    end = states.storage_offset() + (batch * heads * capacity - 1) * states.stride(2) + dim
    fits = end * states.element_size() <= states.untyped_storage().nbytes()
    return states.as_strided((batch, heads, capacity, dim), states.stride()) if capacity >= kv_len and fits else states


def _capacity(states: Tensor) -> int:
    """Slots of every head in the buffer that states [B, H, T, D] lie in; 0 where they lie in none."""
    _, heads, _, dim = states.shape
    row = states.stride(2)
    capacity = states.stride(1) // max(1, row)
    return capacity if row >= dim and states.stride() == (heads * capacity * row, capacity * row, row, 1) else 0
