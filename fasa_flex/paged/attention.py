"""Sparse attention of one decoded token a request to a paged cache: score, select, and read the selected rows."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fasa_flex.backends.gather import gather_focused
from fasa_flex.backends.triton.dispatch import decode_pages_by_kernels, why_no_kernels
from fasa_flex.core.config import Backend
from fasa_flex.core.method import Call, attend
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.selection import Selection
from fasa_flex.core.softmax import Softmax
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.continuous_batching import Pages


def attend_pages(call: Call, pages: Pages, table: Tensor, states: Tensor, backend: Backend) -> Tensor:
    """Compute sparse attention [B, Hq, 1, Dv], reading packed keys and the selected rows of keys and values.

    Args:
        call: one query a row; of its key and value only the shapes are read. Its packed keys are those of all blocks,
            `PackedPages.keys`, and its completion's state holds all requests, `States.all`.
        pages: the layer's pages.
        table: int64 [B, n], the blocks of each request.
        states: int64 [B], rows of the requests in the completion's state.
        backend: "triton", "gather", or "auto" and "fastest": triton if it can serve the call, else gather.

    Raises:
        NotImplementedError: ``backend`` is "triton", which cannot serve the call.
    """
    reason = "gather was asked for" if backend == "gather" else why_no_kernels(call)
    if reason is None:
        return decode_pages_by_kernels(call, pages.keys, pages.values, table, states, pages.stride)
    if backend == "triton":
        raise NotSupportedError(f"backend 'triton' cannot serve a paged cache: {reason}; use backend='auto'.")
    assert isinstance(call.packed_keys, PackedKeys)
    completion = call.completion
    if completion is not None and completion.state is not None:
        completion = replace(completion, state=completion.state.change(lambda tensor: tensor[states]))
    of_rows = replace(call, packed_keys=packed_rows(call.packed_keys, table), completion=completion)
    return attend(of_rows, functools.partial(_focused, pages, table))


def packed_rows(packed: PackedKeys, table: Tensor) -> PackedKeys:
    """Gather the packed keys of requests from all blocks [blocks, Hkv, page, P, 1], in rows, T = n * page."""
    (batch, count), (heads, page, width) = table.shape, packed.tiles.shape[1:4]
    index = table[:, None], torch.arange(heads, device=table.device)[:, None]
    tiles = packed.tiles[index].view(batch, heads, count * page, width, 1)
    return PackedKeys(tiles, None if packed.scales is None else packed.scales[index].view(batch, heads, -1, 1))


def rows_of(slots: Tensor, table: Tensor, pages: Pages) -> Tensor:
    """Find the rows of tokens in `Pages.keys`: integers [B, ..] as ``slots``, whose negative entries stay."""
    found = slots.clamp(min=0)
    blocks = table.gather(1, (found // pages.page).flatten(1).long()).view(slots.shape)
    return torch.where(slots < 0, slots, (blocks * pages.stride + found % pages.page).to(slots.dtype))


def rows_of_table(table: Tensor, pages: Pages) -> Tensor:
    """The rows of all places in blocks [B, n] in `Pages.keys`, int64 [B, n * page]."""
    return (table[:, :, None] * pages.stride + torch.arange(pages.page, device=table.device)).flatten(1)


def _focused(
    pages: Pages, table: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: Selection, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """Gather the selected rows of each head, and attend to them: a `Focus`."""
    batch, heads, shared, _, width = selection.slots.shape
    rows = rows_of(selection.slots.flatten(2), table, pages).view(batch, heads * shared, width)
    head = torch.arange(heads, device=rows.device).repeat_interleave(shared)[:, None]
    every = torch.arange(width, device=rows.device).expand(batch, heads * shared, 1, 1, -1)
    taken = selection.taken.view(batch, heads * shared, 1, 1, width)
    chosen = Selection(every, taken, selection.order)
    return gather_focused(query, pages.keys[rows, head], pages.values[rows, head], chosen, softmax)


def whole_rows(states: Tensor, table: Tensor, pages: Pages, valid: Tensor) -> Tensor:
    """Gather all keys or values of requests, float [B, Hkv, T, D], zero where ``valid`` [B, 1, 1, 1, T] is False."""
    rows = rows_of_table(table, pages)[:, : valid.shape[-1]]
    return torch.where(valid[:, 0, 0, 0, :, None, None], states[rows], 0).transpose(1, 2)
