"""Mixin of cache layers that keep packed keys and the completion's state consistent with their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fasa_flex.backends.triton.dispatch import writes_at_once
from fasa_flex.caches.pinned_memory import settle
from fasa_flex.caches.write_tracking import Written
from fasa_flex.core.completion import CompletionState
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks


class KeepsPackedKeys(CacheLayerMixin):
    """Mixin of a cache layer that updates packed keys and state after every change of keys and values.

    Attributes:
        scorer: sets the packed dimensions and their precision; one chunk set per key/value head.
        packed: the packed keys; None while the layer is empty.
        state: the completion's state; None until an attention call needs it.
    """

    keys: Tensor
    values: Tensor
    scorer: DominantChunks
    packed: PackedKeys | None
    state: CompletionState | None
    _written: Written

    def repack(self, scorer: DominantChunks) -> None:
        """Pack all keys again, at the dimensions and in the precision of ``scorer``."""
        self.scorer, self.packed, self.state = scorer, None, None
        if self.is_initialized and self.keys.numel():
            self._settle()
            rows = scorer.pack(self.keys).to(scorer.dims.device)  # keys may be in host memory (FASA-M, offloading)
            self.packed = PackedKeys.of(rows, scorer.dtype)
        self._mark_anew()

    def _mark_anew(self) -> None:
        """Record the current keys as written by this layer."""
        self._written = Written()
        if self.is_initialized and self.keys.numel() and not torch.compiler.is_compiling():
            self._written.mark(self.keys, self.keys.shape[2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows for beam search."""
        self._settle()
        super().reorder_cache(beam_idx)
        self._change(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def offload(self) -> None:
        """Move the layer to host memory."""
        super().offload()
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        super().prefetch()
        self._change(lambda states: states.to(self.device, non_blocking=True))

    def _settle(self) -> None:
        """Wait until the device has finished its writes to host memory that the host is about to read."""
        if self.is_initialized:
            settle(self.keys, self.device)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.packed = self.packed.change(change)
        if self.state is not None:
            self.state = self.state.change(change)
        self._mark_anew()

    def advance(self, key: Tensor, value: Tensor, first_order: bool, *counted: Any) -> CompletionState:
        """Update the completion's state after a forward; ``counted``: last arguments of `CompletionState.advance`."""
        state = self.state
        if state is None or state.key_sum.shape[2] != (key.shape[3] if first_order else 0):
            state = CompletionState.empty(key, value, first_order, self.scorer.dims.device)
        elif not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()) and state.covered.is_inference():
            state = state.change(Tensor.clone)
        state.advance(key, value, *counted)
        self.state = state
        return state


def write_token(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: PackedKeys,
    scorer: DominantChunks,
    length: Tensor | int,
) -> bool:
    """Write one decoded token to slot ``length`` with one kernel; return False, and write nothing, if none serves."""
    dims = scorer.dims
    if not writes_at_once(key, value, keys, values, packed, dims):
        return False
    from fasa_flex.backends.triton.writing import write_token  # Triton is installed with CUDA only

    scales = None if packed.scales is None else packed.scales.squeeze(3)
    mean_key = None if scorer.mean_key is None else scorer.mean_key.contiguous()
    write_token(key, value, keys, values, packed.tiles.squeeze(4), scales, dims.contiguous(), mean_key, length)
    return True


def writable(buffer: Tensor) -> bool:
    """Whether ``buffer`` may be written to here: inference tensors may not outside inference mode."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()
