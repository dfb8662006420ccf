"""Attention to gathered rows: selected keys and values are copied to a dense buffer, from host memory too."""

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
    """Compute attention over selected rows of K and V, gathered into dense buffers [.., K, D]; on a CPU K alone.

    Args:
        log_weights: float32 [B, H, G, Q, K], log of the number of keys that each selected key represents; None: 0.

    Returns:
        output and log-sum-exp, as `fasa_flex.core.method.Focus` states them.
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
    # a query without keys attends to padding and is zeroed below, since a softmax over nothing has NaN gradients
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
    """Gather rows of keys or values to the device of ``slots``.

    If the states are the first slots of a buffer, one `index_select` gathers the rows of all heads, two to three times
    as fast as advanced indexing. Rows in host memory (FASA-M) are gathered there, and only they are copied.

    Args:
        states: float [B, H, T, D], keys or values.
        slots: int64 [B, H, G, Q, K], the rows to gather.

    Returns:
        [B, H * G * Q, K, D], on the device of ``slots``.
    """
    device = slots.device
    if states.device != device:
        slots = slots.to(states.device)
    batch, heads, _, dim = states.shape
    in_buffer = _table(states, slots)
    if in_buffer is not None:
        table, index = in_buffer
        rows = table.index_select(0, index.flatten())
    else:
        b = torch.arange(batch, device=slots.device).view(-1, 1, 1, 1, 1)
        rows = states[b, torch.arange(heads, device=slots.device).view(-1, 1, 1, 1), slots]
    return rows.view(batch, -1, slots.shape[-1], dim).to(device)


def dot_rows(query: Tensor, rows: Tensor) -> Tensor:
    """Multiply queries [B, H, M, D] by rows [B, H, K, D]: [B, H, M, K], summed in float32 or float64.

    In a graph for CPU the gather of the rows fuses with the products, without a buffer of rows.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, rows = query.to(wide), rows.to(wide)
        if torch.compiler.is_compiling() and query.device.type == "cpu":
            products: Tensor = compute_once(query)[:, :, :, None] * rows[:, :, None]
            return products.sum(-1)
        return query @ rows.mT


def weigh_rows(weights: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """Compute weighted sums of selected rows, on a CPU without a buffer: page faults would cost more than the sums.

    Args:
        weights: [B, H * G * Q, M, K], in the dtype of ``states``.
        states: float [B, H, T, D], values.
        slots: int64 [B, H, G, Q, K], the selected rows.

    Returns:
        [B, H * G * Q, M, D].
    """
    if slots.device.type != "cpu":
        return weights @ take_rows(states, slots)
    batch, count, _, width = weights.shape
    in_buffer = _table(states, slots) if states.stride(2) == states.shape[3] else None
    if in_buffer is not None:
        table, index = in_buffer
    else:  # embedding_bag would copy a whole table with gaps
        table = take_rows(states, slots).flatten(0, 2)
        index = torch.arange(len(table))
    bags = index.view(batch, count, 1, width).expand_as(weights)
    sums = F.embedding_bag(bags.reshape(-1, width), table, mode="sum", per_sample_weights=weights.reshape(-1, width))
    return sums.view(*weights.shape[:3], -1)


def _table(states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor] | None:
    """View the buffer whose first slots are the states [B, H, T, D] as one table of rows; None: there is no buffer.

    Returns:
        the table, float [.., D], and the table rows of ``slots``, int64 [B, H, G, Q, K].
    """
    batch, heads, kv_len, dim = states.shape
    row, capacity = states.stride(2), _capacity(states)
    if capacity < kv_len or (row != dim and torch.compiler.is_compiling()):
        return None  # Inductor may store a tensor with gaps without them after a write
    first = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1, 1, 1) * capacity
    count = (batch * heads - 1) * capacity + kv_len
    return states.as_strided((count, dim), (row, 1)), slots + first


def whole_buffer(states: Tensor) -> Tensor:
    """Return the buffer [B, H, C, D] whose first slots are ``states`` [B, H, T, D], or the states if there is none.

    Slots behind the states hold no data. A graph that is compiled for the buffer serves until the buffer is full.
    """
    batch, heads, kv_len, dim = states.shape
    capacity = _capacity(states)
    end = states.storage_offset() + (batch * heads * capacity - 1) * states.stride(2) + dim
    fits = end * states.element_size() <= states.untyped_storage().nbytes()
    return states.as_strided((batch, heads, capacity, dim), states.stride()) if capacity >= kv_len and fits else states


def _capacity(states: Tensor) -> int:
    """Number of slots per head in the buffer that contains the states [B, H, T, D]; 0: there is no such buffer."""
    _, heads, _, dim = states.shape
    row = states.stride(2)
    capacity = states.stride(1) // max(1, row)
    return capacity if row >= dim and states.stride() == (heads * capacity * row, capacity * row, row, 1) else 0
