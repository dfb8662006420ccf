"""A static cache layer that keeps packed keys beside keys and values (FASA-C)."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.caches.capacity import CountedStaticLayer
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys, writable, write_token
from fasa_flex.caches.write_tracking import counting
from fasa_flex.core.compiler import keep_rounding
from fasa_flex.core.scoring import DominantChunks


class StaticPackedLayer(KeepsPackedKeys, CountedStaticLayer):
    """A static layer with packed keys for compiled decoding; its first update allocates the buffers."""

    def __init__(self, scorer: DominantChunks, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.repack(scorer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        self.repack(self.scorer)

    def repack(self, scorer: DominantChunks) -> None:
        """Pack all keys again, at the dimensions and in the precision of ``scorer``."""
        with counting():
            super().repack(scorer)
        if self.packed is not None and not torch.compiler.is_compiling():
            for buffer in (self.packed.tiles, self.packed.scales):
                if buffer is not None:
                    torch._dynamo.mark_static_address(buffer)

    def reset(self) -> None:
        """Remove all tokens; the buffers stay allocated."""
        super().reset()
        if self.packed is not None:
            self.packed.change(Tensor.zero_)
        if self.state is not None:
            self.state = self.state if writable(self.state.covered) else self.state.change(Tensor.clone)
            self.state.covered.zero_()
            self._mark_anew()

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.compiler.is_compiling():
            return self._write_all(keep_rounding(key_states), value_states)
        if not self._written.knows(self.keys):  # written by user code or compiled steps
            self.repack(self.scorer)
        states = self._write_all(key_states, value_states)
        self._written.mark(self.keys, 0)
        return states

    def _write_all(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys, values and packed keys."""
        assert self.packed is not None
        packed, written = self.packed, self.cumulative_length
        states = (key_states, value_states, self.keys, self.values)
        if write_token(*states, packed, self.scorer, written):
            written.add_(1)
            return self.keys, self.values
        slots, length = written.view(1), key_states.shape[2]
        if length > 1:
            slots = slots + torch.arange(length, device=self.device)
        packed.write(self.scorer.pack(key_states), slots)
        return self._write_states(key_states, value_states)

    def _write_states(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values, without the packed keys."""
        return super()._write(key_states, value_states)
