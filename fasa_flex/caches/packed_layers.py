"""A growing cache layer that keeps packed keys beside keys and values (FASA-C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fasa_flex.caches.capacity import check_crop
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys, writable, write_token
from fasa_flex.caches.write_tracking import Written, counting, held_by
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks


class PackedLayer(KeepsPackedKeys, DynamicLayer):
    """A growing layer with packed keys.

    Its buffers have an eighth of free space and are written in place; `DynamicLayer` copies all keys and values in
    every step.
    """

    def __init__(self, scorer: DominantChunks) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.repack(scorer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; return all of them. On out-of-memory the layer is unchanged."""
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[2]
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # traceable and differentiable
            former = (self.keys, self.values)
            keys, values = map(_behind, former, new) if start else new
            self._check_written(start)
            packed, self._buffers = self._packed_for(end), None
        else:
            if not self._continues(key_states, value_states, start, end):
                self._grow(*new, start, end)
            assert self._buffers is not None
            packed = self.packed
            keys, values = self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]
            written = False
            if start and packed is not None and packed.tiles.shape[4] == 1:  # the kernel writes rows, not tiles
                written = write_token(*new, *self._buffers, packed, self.scorer, start)
            if written:
                self.keys, self.values = keys, values
                self._written.mark(keys, end)
                return keys, values
            for buffer, states in zip(self._buffers, new, strict=True):
                buffer[:, :, start:end].copy_(states, non_blocking=True)
        rows = self.scorer.pack(key_states.detach())
        if packed is None:
            packed = PackedKeys.of(rows, self.scorer.dtype, self._room_packed(end))
        else:
            packed.write(rows, start)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values, self.packed = keys, values, packed
        if not torch.compiler.is_compiling():
            self._written.mark(keys, end)
        return keys, values

    def _continues(self, key: Tensor, value: Tensor, start: int, end: int) -> bool:
        """Whether the buffers can take the next tokens: unchanged since the last write, and with free space."""
        written, buffers, packed = self._written, self._buffers, self.packed
        if buffers is None or packed is None or start != written.end or not written.knows(self.keys):
            return False
        for states, held, buffer in ((key, self.keys, buffers[0]), (value, self.values, buffers[1])):
            if states.dtype != buffer.dtype or buffer.shape[2] < end or buffer.is_inference():
                return False
            if held.data_ptr() != buffer.data_ptr() or held.stride() != buffer.stride() or len(held) != len(buffer):
                return False
        tiles = packed.tiles
        return tiles.shape[2] * tiles.shape[4] >= end and not tiles.is_inference()

    def _check_written(self, start: int) -> None:
        """Pack keys again if user code has changed them; stop using buffers that other tensors share.

        Buffers are shared with a shallow copy of this layer that was continued, or with tensors returned before a crop.
        """
        if torch.compiler.is_compiling() or not start:
            return
        written = self._written
        if not written.knows(self.keys):
            self.repack(self.scorer)
        elif start != written.end and not self._holds_alone():
            self._change(Tensor.clone)
        self._written.end = start

    def _holds_alone(self) -> bool:
        """Whether this layer alone refers to the memory of its buffers."""
        if self._buffers is None:
            return False
        views = 2 if self.keys.untyped_storage().data_ptr() == self.values.untyped_storage().data_ptr() else 1
        return all(held_by(buffer) == self._written.alone + views for buffer in self._buffers)

    def _grow(self, key: Tensor, value: Tensor, start: int, end: int) -> None:
        """Grow every buffer to ``end`` tokens like ``key`` and ``value``; on out-of-memory the layer is unchanged."""
        self._check_written(start)
        former, buffers = (self.keys, self.values), self._buffers
        if start and buffers and not all(map(_begins, former, buffers)):
            buffers = None  # user code has replaced keys or values
        if start:
            key, value = _wider(key, self.keys), _wider(value, self.values)
        grows = not start or not buffers or not all(map(_serves, (key, value), buffers, (end, end)))
        if grows:
            with counting():
                buffers = self._allocate(key, value, _room_for(end))
            self._written = Written(alone=held_by(buffers[0]))
            buffers[1][:, :, end:] = 0  # flex multiplies free slots of a block by weights of 0
            if start:
                self._settle()
                for buffer, states in zip(buffers, former, strict=True):
                    buffer[:, :, :start] = states
        self.packed = self._packed_for(end)
        self._buffers = buffers
        if grows and start and buffers:
            self.keys, self.values = (buffer[:, :, :start] for buffer in buffers)
            self._written.mark(self.keys, start)

    def _packed_for(self, end: int) -> PackedKeys | None:
        """Return writable packed keys with room for ``end`` tokens; None while there are no packed keys."""
        if self.packed is not None and self.packed.capacity < end:
            return self.packed.grown(self._room_packed(end))
        if self.packed is not None and not writable(self.packed.tiles):
            return self.packed.change(Tensor.clone)
        return self.packed

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        self._buffers = None  # keys and values are new tensors outside the buffers

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens from the end.

        Raises:
            ValueError: ``tokens_to_remove`` is positive.
        """
        check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def _allocate(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Allocate buffers for ``length`` tokens, with the sizes and dtypes of ``key`` and ``value``."""
        keys, values = (states.new_empty(*states.shape[:2], length, states.shape[3]) for states in (key, value))
        return keys, values

    def _room_packed(self, length: int) -> int:
        """Number of packed keys to allocate for ``length`` tokens."""
        return _room_for(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        self._settle()
        super().batch_repeat_interleave(repeats)
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        self._settle()
        super().batch_select_indices(indices)
        self._change(lambda states: states[indices])

    def reset(self) -> None:
        """Empty the layer; transformers 5.17 fills a growing one with zeros instead."""
        super().reset()
        self._buffers = None
        self.repack(self.scorer)


def _room_for(length: int) -> int:
    """Number of slots to allocate for ``length`` tokens: an eighth more, at least 128 more, a multiple of 32."""
    return (length + length // 8 + 159) // 32 * 32


def _behind(states: Tensor, new: Tensor) -> Tensor:
    return torch.cat([states.to(new.device), new], dim=2)


def _begins(states: Tensor, buffer: Tensor) -> bool:
    """Whether ``states`` are the first slots of ``buffer``."""
    return states.data_ptr() == buffer.data_ptr() and states.stride() == buffer.stride() and len(states) == len(buffer)


def _serves(states: Tensor, buffer: Tensor, end: int) -> bool:
    """Whether a buffer has the dtype of ``states`` and room for ``end`` tokens, and may be written to."""
    return buffer.dtype == states.dtype and buffer.shape[2] >= end and writable(buffer)


def _wider(states: Tensor, cached: Tensor) -> Tensor:
    """Convert ``states`` to the dtype to which `torch.cat` would promote them and the ``cached`` ones."""
    if states.dtype == cached.dtype:  # fast path of every token; dtypes differ only after autocast
        return states
    return states.to(torch.promote_types(states.dtype, cached.dtype))
