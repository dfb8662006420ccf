"""A decode step by the Triton kernels: the checks of what they serve, and the conversion of a call's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import cover_on
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import flags
from fasa_flex.core.softmax import Softmax
from fasa_flex.errors import NotSupportedError

if TYPE_CHECKING:
    from fasa_flex.backends.triton.attention import Ending
    from fasa_flex.backends.triton.tip import Tip


def why_no_kernels(call: Call) -> str | None:
    """The reason why the kernels cannot serve a call; None if they can."""
    query, packed = call.query, call.packed_keys
    if not query.is_cuda:
        return f"it needs a CUDA device, the query is on {query.device.type}"
    if query.shape[2] != 1:
        return f"it decodes one query a row, got {query.shape[2]}"
    if not isinstance(call.scorer, DominantChunks) or not isinstance(packed, PackedKeys):
        return "it needs the PackedKeys of dominant chunks"
    if isinstance(call.budget.n_fac, tuple):
        return f"n_fac must be one count or share for all heads, got {call.budget.n_fac}"
    if packed.tiles.shape[4] != 1:
        return f"it needs packed keys in rows, got tiles of {packed.tiles.shape[4]}"
    if packed.capacity % 16:
        return f"a head or a block must have room for a multiple of 16 packed keys, got {packed.capacity}"
    if (elements := packed.tiles[0, 0].numel()) >= 2**31:
        return f"a head's packed keys must have fewer than {2**31} elements, got {elements}"
    if call.group_reduce == "none" and query.shape[1] != call.key.shape[1]:
        return "a group's query heads must select together"
    if call.completion is not None and call.completion.state is None:
        return "it completes from a cache's state, and the call has none"
    return why_not_these(query, call.key, call.value)


def check_kernels(
    device: torch.device, layer: int, scorer: object, budget: Budget, config: FasaConfig, packs: bool, group: int
) -> None:
    """Refuse a layer that `why_no_kernels` would refuse at every decoded token.

    Args:
        device: the layer's device.
        layer: its number.
        scorer: its scorer.
        budget: its budget.
        config: the config given to `enable`.
        packs: whether caches store packed keys.
        group: query heads of a key/value head.

    Raises:
        NotImplementedError: with the reason.
    """
    reason = None
    if device.type != "cuda":
        reason = f"it needs a CUDA device, the layer is on {device.type}"
    elif config.prefill != "dense":
        reason = "it decodes one query a row, and prefill='sparse' has several"
    elif not isinstance(scorer, DominantChunks) or not packs:
        reason = "it needs the packed keys of dominant chunks, one set for a key/value head"
    elif isinstance(budget.n_fac, tuple):
        reason = f"its budget must be one count or share for all heads, got {budget.n_fac}"
    elif config.group_reduce == "none" and group > 1:
        reason = "a group's query heads must select together"
    if reason is not None:
        raise NotSupportedError(f"backend='triton' cannot serve layer {layer}: {reason}; use backend='auto'.")


def why_not_these(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """The reason why the kernels cannot read these tensors; None if they can."""
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "each row of keys and values must be contiguous"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "it computes no gradients"
    return None


def _cover(*arguments: Any) -> None:
    """`cover_blocks` on a GPU."""
    from fasa_flex.backends.triton.completion import cover_by_kernel  # Triton is there with CUDA only

    cover_by_kernel(*arguments)


cover_on["cuda"] = _cover


def writes_at_once(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, packed: PackedKeys, dims: Tensor) -> bool:
    """Whether `fasa_flex.backends.triton.writing` can write a decoded token's ``key`` and ``value`` into the buffers.

    Otherwise PyTorch's operators write them; under torch.compile these are fused anyway.
    """
    if torch.compiler.is_compiling() or not key.is_cuda or key.shape[2] != 1:
        return False
    fit = all(
        (*new.shape[:2], new.shape[3], new.dtype, new.device, 1)
        == (*buffer.shape[:2], buffer.shape[3], buffer.dtype, buffer.device, buffer.stride(3))
        for new, buffer in ((key, keys), (value, values))
    )
    here = packed.tiles.device == dims.device == key.device
    rows = packed.tiles.shape[2] >= keys.shape[2] and packed.tiles.is_contiguous()
    return fit and here and rows and why_not_these(key, key, value) is None


def serves_pages(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether kernels write new tokens' ``key`` and ``value`` to pages, and extend completion states from there."""
    pairs = (key, keys), (value, values)
    fit = all(new.dtype == rows.dtype and new.stride(2) == rows.stride(2) == 1 for new, rows in pairs)
    return key.is_cuda and fit and not (torch.is_grad_enabled() and (key.requires_grad or value.requires_grad))


def decode_by_kernels(call: Call) -> Tensor:
    """Run a call of one query a row that `why_no_kernels` accepts; returns [B, Hq, 1, Dv]."""
    from fasa_flex.backends.triton.decode import (  # Triton is installed with CUDA only
        attend_slots,
        hold_slots,
        select_slots,
        sparse_decode,
    )

    query, *settings = _arguments_of(call)
    ranking, ending = cast("list[tuple[Any, ...]]", settings)
    key, value, held = call.key, call.value, call.resident
    if held is None or held.count != call.budget.widest(call.valid.shape[-1]):
        return sparse_decode(query, key, value, *ranking, *ending)
    found = select_slots(query, *ranking)
    places = hold_slots(key, value, found[0], held.slots, held.places, held.keys, held.values, held.length)
    return attend_slots(query, held.keys, held.values, places, *found, *ranking, *ending)


def decode_pages_by_kernels(
    call: Call, keys: Tensor, values: Tensor, table: Tensor, states: Tensor, stride: int
) -> Tensor:
    """Run a call whose keys, values and packed keys are in pages; returns [B, Hq, 1, Dv].

    Args:
        call: as for `decode_by_kernels`; of its key and value only the shapes are read. Its `PackedKeys` are those of
            all blocks [blocks, Hkv, page, P, 1], and its completion's state has a row for each request of the cache.
        keys: float [R, Hkv, D], the rows of all pages.
        values: float [R, Hkv, Dv], likewise.
        table: int64 [B, n], the blocks of each batch row.
        states: int64 [B], rows of the completion's state.
        stride: distance of two blocks in rows of ``keys``.
    """
    from fasa_flex.backends.triton.decode import sparse_decode  # Triton is installed with CUDA only

    query, tip, ending = _arguments_of(call)
    tip = tip._replace(table=table, page=tip.packed.shape[2], stride=stride)
    key, value = (states.transpose(0, 1)[None].expand(len(query), -1, -1, -1) for states in (keys, values))
    return sparse_decode(query, key, value, *tip, *ending._replace(states=states))


def _arguments_of(call: Call) -> tuple[Tensor, Tip, Ending]:
    """A call's query, contiguous, and the arguments that the operators share: the fields of `Tip` and of `Ending`."""
    from fasa_flex.backends.triton.attention import Ending  # Triton is installed with CUDA only
    from fasa_flex.backends.triton.tip import Tip

    query, scorer, packed, softmax = call.query.contiguous(), call.scorer, call.packed_keys, call.softmax
    assert isinstance(scorer, DominantChunks)
    assert isinstance(packed, PackedKeys)
    marks, completion = call.known_marks(), call.completion
    assert marks.bytes is not None
    how = call.group_reduce if query.shape[1] > call.key.shape[1] else "max"
    tip = Tip(
        scorer.dims.contiguous(),
        None if scorer.weights is None else scorer.weights.contiguous(),
        packed.tiles.squeeze(4),
        None if packed.scales is None else packed.scales.squeeze(3),
        _shift(query, scorer, how in ("max", "mean") and query.shape[1] > call.key.shape[1], softmax),
        in_rows(marks.bytes),
        None if marks.sample is None or how == "softmax_exact" else in_rows(marks.sample),
        call.valid.shape[-1],
        call.budget.widest(call.valid.shape[-1]),
        call.budget.trillionths,
        "softmax" if how == "softmax_exact" else how,
        softmax.scaling,
        softmax.softcap,
        completion is not None,
    )
    sinks = None if softmax.sinks is None else softmax.sinks.contiguous()
    if completion is None:
        return query, tip, Ending(sinks=sinks)
    assert completion.state is not None
    state = completion.state
    return query, tip, Ending(state.mean_value, state.covariance, state.covered, completion.strength, sinks)


def _shift(query: Tensor, scorer: DominantChunks, compares: bool, softmax: Softmax) -> Tensor | None:
    """`DominantChunks.shift`, float32 [B * Hq], if scores are capped or compared between query heads; else None.

    Otherwise it cancels, since it is the same for all keys of a query head.
    """
    shift = scorer.shift(query) if compares or softmax.softcap is not None else None
    return None if shift is None else shift.flatten().contiguous()


def in_rows(marked: Tensor) -> Tensor:
    """[B or 1, 1, 1, 1, N] as [B or 1, N], rows contiguous; bool as uint8."""
    rows = marked.flatten(1)
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    return flags(rows) if rows.dtype == torch.bool else rows
