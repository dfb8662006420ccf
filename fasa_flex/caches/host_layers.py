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
    """The half of a layer whose keys and values are in host memory (FASA-M): the rows that the device holds of them.

    Attributes:
        hold: rows a key/value head to hold, the budget of the layer; 0 for none.
        held: these rows; None while the layer is empty.
    """

    hold: int
    resident: ResidentRows | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        length = self.cumulative_length if isinstance(self, StaticLayer) else None
        self.resident = ResidentRows.empty(key_states, value_states, self.hold, length) if self.hold else None

    def offload(self) -> None:
        """Nothing: keys and values are in host memory already."""

    def prefetch(self) -> None:
        """Nothing: the selected rows cross when they are known."""

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end, a negative number of them."""
        super().crop(tokens_to_remove)
        self._forget()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        if self.resident is not None:
            self.resident = self.resident.change(change)

    def own_resident(self) -> ResidentRows | None:
        """What is held, as tensors that may be written to: those made in inference mode may not outside of it."""
        if self.resident is not None and not torch.compiler.is_compiling() and not writable(self.resident.slots):
            self.resident = self.resident.change(Tensor.clone)
        return self.resident

    def _forget(self) -> None:
        held = self.own_resident()
        if held is not None:
            held.forget()


class HostLayer(OnHost, PackedLayer):
    """A growing layer whose keys and values are in host memory, pinned where there is an accelerator (FASA-M).

    What attention gets of it in decode are the host's tensors, of which only the selected rows cross (`take_rows`).
    A forward of several tokens gets all of them, on the device, while it runs.
    """

    def __init__(self, scorer: DominantChunks, hold: int = 0) -> None:
        super().__init__(scorer)
        self.hold, self.resident = hold, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; returns all of them, in host memory for t = 1."""
        first = self.get_seq_length() == 0
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first:
            return key_states, value_states
        if key_states.shape[2] > 1:
            return keys.to(key_states.device), values.to(value_states.device)
        return keys, values

    def reserve(self, length: int) -> None:
        """Make room for ``length`` more tokens.

        Raises:
            ValueError: the host has no memory for them; the layer is as before.
        """
        start = self.get_seq_length()
        if start and not self.keys.requires_grad:
            self._grow(self.keys, self.values, start, start + length)

    def _allocate(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        device = self.device if self.is_initialized else key.device
        return split_rows(host_rows(key, value, length, device), key.shape[3])

    def _room_packed(self, length: int) -> int:
        """A sixteenth to spare; buffers of the host have an eighth, but what the device holds is what FASA-M saves."""
        return (length + max(32, length // 16)) // 32 * 32


class StaticHostLayer(OnHost, StaticPackedLayer):
    """A layer of a fixed length whose keys and values are in host memory, which the device addresses (FASA-M).

    A decode step waits for nothing on the host and fits a CUDA graph. A forward of several tokens gets copies of all
    keys and values on the device.

    Attributes:
        rows: [B, Hkv, max_cache_len, D + Dv], of which `keys` and `values` are views. A step writes to it alone: of two
            tensors that share memory a compiler would make copies.
    """

    max_cache_len: int
    rows: Tensor

    def __init__(self, scorer: DominantChunks, max_cache_len: int, hold: int = 0) -> None:
        super().__init__(scorer, max_cache_len)
        self.hold, self.resident = hold, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; pickled tensors share no memory, and keys and values are to be views of the rows."""
        self.__dict__.update(state)
        if "rows" in state:
            self.keys, self.values = split_rows(self.rows, self.keys.shape[3])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        length = self.max_cache_len
        with counting():
            rows = mapped_rows(key_states, value_states, length)
        self.max_cache_len = 0  # or buffers of the device would be allocated
        try:
            super().lazy_initialization(key_states, value_states)
        finally:
            self.max_cache_len = length
        self.rows, (self.keys, self.values) = rows, split_rows(rows, key_states.shape[3])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(rows)
        self.repack(self.scorer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, Hkv, t, D] behind those held; returns the whole buffers, for t > 1 on the device.

        Raises:
            ValueError: there is no room for them.
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
        """Reorder the rows for beam search."""
        keys, values = self.keys, self.values
        super().reorder_cache(beam_idx)
        self.keys, self.values = keys.copy_(self.keys), values.copy_(self.values)
