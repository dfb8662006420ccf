"""Cache layers with keys and values in host memory and packed keys on the device, growing and static (FASA-M)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys, writable
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.pinned_memory import host_rows, mapped_rows, split_rows
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.caches.write_tracking import counting
from fasa_flex.core.resident_rows import ResidentRows
from fasa_flex.core.scoring import DominantChunks


class OnHost(KeepsPackedKeys):
    """Mixin of a layer with keys and values in host memory (FASA-M): keeps the resident rows on the device.

    Attributes:
        hold: number of resident rows per key/value head, the budget of the layer; 0: none.
        resident: rows of the last selection on the device; None while the layer is empty.
    """

    hold: int
    resident: ResidentRows | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        length = self.cumulative_length if isinstance(self, StaticLayer) else None
        self.resident = ResidentRows.empty(key_states, value_states, self.hold, length) if self.hold else None

    def offload(self) -> None:
        """Do nothing: keys and values are in host memory already."""

    def prefetch(self) -> None:
        """Do nothing: the selected rows are copied after the selection."""

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens from the end."""
        super().crop(tokens_to_remove)
        self._forget()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        if self.resident is not None:
            self.resident = self.resident.change(change)

    def own_resident(self) -> ResidentRows | None:
        """Return the resident rows, copied if they are inference tensors and cannot be written to here."""
        if self.resident is not None and not torch.compiler.is_compiling() and not writable(self.resident.slots):
            self.resident = self.resident.change(Tensor.clone)
        return self.resident

    def _forget(self) -> None:
        resident = self.own_resident()
        if resident is not None:
            resident.forget()


class HostLayer(OnHost, PackedLayer):
    """A growing layer with keys and values in host memory, pinned if there is an accelerator (FASA-M).

    In a decode step attention receives the host tensors and copies only the selected rows to the device (`take_rows`).
    A forward of several tokens receives temporary copies of all keys and values on the device.
    """

    def __init__(self, scorer: DominantChunks, hold: int = 0) -> None:
        super().__init__(scorer)
        self.hold, self.resident = hold, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; return all keys and values, for t = 1 in host memory."""
        first = self.get_seq_length() == 0
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first:
            return key_states, value_states
        if key_states.shape[2] > 1:
            return keys.to(key_states.device), values.to(value_states.device)
        return keys, values

    def reserve(self, length: int) -> None:
        """Allocate space for ``length`` more tokens.

        Raises:
            ValueError: the host has no memory for them; the layer is unchanged.
        """
        start = self.get_seq_length()
        if start and not self.keys.requires_grad:
            self._grow(self.keys, self.values, start, start + length)

    def _allocate(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        device = self.device if self.is_initialized else key.device
        return split_rows(host_rows(key, value, length, device), key.shape[3])

    def _room_packed(self, length: int) -> int:
        """Number of packed keys to allocate: a sixteenth more than ``length``, not an eighth, to save device memory."""
        return (length + max(32, length // 16)) // 32 * 32


class StaticHostLayer(OnHost, StaticPackedLayer):
    """A static layer with keys and values in host memory that the device's kernels address directly (FASA-M).

    A decode step does not synchronise with the host and can be captured in a CUDA graph. A forward of several tokens
    receives copies of all keys and values on the device.

    Attributes:
        rows: [B, Hkv, max_cache_len, D + Dv]; `keys` and `values` are views of it. Steps write to ``rows`` alone, since
            the compiler would copy two tensors that share memory.
    """

    max_cache_len: int
    rows: Tensor

    def __init__(self, scorer: DominantChunks, max_cache_len: int, hold: int = 0) -> None:
        super().__init__(scorer, max_cache_len)
        self.hold, self.resident = hold, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, and make keys and values views of the rows again: pickled tensors share no memory."""
        self.__dict__.update(state)
        if "rows" in state:
            self.keys, self.values = split_rows(self.rows, self.keys.shape[3])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        length = self.max_cache_len
        with counting():
            rows = mapped_rows(key_states, value_states, length)
        self.max_cache_len = 0  # the base class would allocate buffers on the device
        try:
            super().lazy_initialization(key_states, value_states)
        finally:
            self.max_cache_len = length
        self.rows, (self.keys, self.values) = rows, split_rows(rows, key_states.shape[3])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(rows)
        self.repack(self.scorer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; return the complete buffers, for t > 1 on the device.

        Raises:
            ValueError: they do not fit.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[2] == 1:
            return keys, values
        self._forget()
        return (keys.clone(), values.clone()) if keys.is_cuda else (keys, values)

    def _write_states(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        length = key_states.shape[2]
        slots = self.cumulative_length + torch.arange(length, device=self.device)
        self.cumulative_length.add_(length)
        self.rows.index_copy_(2, slots, torch.cat([key_states, value_states], dim=3))
        return split_rows(self.rows, key_states.shape[3])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows for beam search."""
        keys, values = self.keys, self.values
        super().reorder_cache(beam_idx)
        self.keys, self.values = keys.copy_(self.keys), values.copy_(self.values)
