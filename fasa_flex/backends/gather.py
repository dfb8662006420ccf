"""Attention to the selected rows of keys and values, fetched from where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.compiler import compute_once
from fasa_flex.core.selection import Selection
from fasa_flex.core.softmax import Softmax


def gather_focused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    softmax: Softmax,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the selected rows of K and V, fetched into a dense buffer [.., K, D]; on CPU those of K alone.

    Args:
        log_weights: float32 [B, H, G, Q, K], how many keys each selected one stands for, as a logarithm; None: itself.

    Returns:
        as `fasa_flex.core.method.Focus`.
    """
    batch, query_heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    slots = selection.slots
    shared, width = slots.shape[2], slots.shape[4]
    members = query_heads // kv_heads // shared
    rows = take_rows(key, slots)
    grouped = query.view(batch, kv_heads, shared, members, q_len, head_dim).transpose(3, 4)
    grouped = grouped.reshape(batch, -1, members, head_dim)
    some = selection.taken.any(-1, keepdim=True)
    # a query without a key attends to anything, and is set to zero below: a softmax over nothing has NaN gradients
    taken = (selection.taken | ~some).reshape(batch, -1, 1, width)
    weigh_by = None if log_weights is None else log_weights.reshape(batch, -1, 1, width)
    lse = None
    if query.device.type != "cpu" and softmax.plain:
        values = take_rows(value, slots)
        mask = taken if weigh_by is None else torch.where(taken, weigh_by.to(query.dtype), -torch.inf)
        out = F.scaled_dot_product_attention(grouped, rows, values, attn_mask=mask, scale=softmax.scaling)
    else:
        logits = softmax.logits(dot_rows(grouped, rows))
        logits = (logits if weigh_by is None else logits + weigh_by).masked_fill(~taken, -torch.inf)
        out = weigh_rows(logits.softmax(-1).to(value.dtype), value, slots)
        if softmax.sinks is not None:
            by_member = logits.logsumexp(-1).view(batch, kv_heads, shared, q_len, members).transpose(3, 4)
            lse = torch.where(some[..., None, :, 0], by_member, -torch.inf).reshape(batch, query_heads, q_len)
    out = out.view(batch, kv_heads, shared, q_len, members, -1).transpose(3, 4)
    return torch.where(some[:, :, :, None], out, 0.0).reshape(batch, query_heads, q_len, -1), lse


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
    found = _table(states, slots)
    if found is not None:
        table, index = found
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
    found = _table(states, slots) if states.stride(2) == states.shape[3] else None
    if found is not None:
        table, index = found
    else:  # of a table with gaps embedding_bag makes a copy
        table = take_rows(states, slots).flatten(0, 2)
        index = torch.arange(len(table))
    bags = index.view(batch, count, 1, width).expand_as(weights)
    sums = F.embedding_bag(bags.reshape(-1, width), table, mode="sum", per_sample_weights=weights.reshape(-1, width))
    return sums.view(*weights.shape[:3], -1)


def _table(states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor] | None:
    """The buffer that states [B, H, T, D] are the first slots of, as rows; None: they lie in none.

    Returns:
        float [.., D], the rows as they lie, and int64 [B, H, G, Q, K], where in them the ``slots`` are.
    """
    batch, heads, kv_len, dim = states.shape
    row, capacity = states.stride(2), _capacity(states)
    if capacity < kv_len or (row != dim and torch.compiler.is_compiling()):
        return None  # the compiler may hold a tensor with gaps as one without, once it was written to
    first = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1, 1, 1) * capacity
    count = (batch * heads - 1) * capacity + kv_len
    return states.as_strided((count, dim), (row, 1)), slots + first


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
