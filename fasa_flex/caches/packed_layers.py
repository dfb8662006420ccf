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

    It grows in place, in buffers with an eighth to spare, where `DynamicLayer` copies all keys and values every time.
    """

    def __init__(self, scorer: DominantChunks) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.repack(scorer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; returns all of them. Where memory runs out, nothing is lost."""
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[2]
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # by copies, which a compiler and autograd know
            held = (self.keys, self.values)
            keys, values = map(_behind, held, new) if start else new
            self._check_written(start)
            packed, self._buffers = self._packed_for(end), None
        else:
            if not self._continues(key_states, value_states, start, end):
                self._grow(*new, start, end)
            assert self._buffers is not None
            packed = self.packed
            keys, values = self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]
            written = False
            if start and packed is not None and packed.tiles.shape[4] == 1:  # rows, as a kernel writes them
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
        """Whether the buffers take the next tokens as they are: unchanged since the last write, and with room."""
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
        """Pack keys anew that somebody has changed, and leave memory that somebody else has a use for.

        A shallow copy of this layer, which has gone on, or tensors that were handed out before it was cropped.
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
        """Whether nothing but this layer has the memory of its buffers."""
        if self._buffers is None:
            return False
        views = 2 if self.keys.untyped_storage().data_ptr() == self.values.untyped_storage().data_ptr() else 1
        return all(held_by(buffer) == self._written.alone + views for buffer in self._buffers)

    def _grow(self, key: Tensor, value: Tensor, start: int, end: int) -> None:
        """Make room for ``end`` tokens such as these, of all that is held or, where memory runs out, of nothing."""
        self._check_written(start)
        held, buffers = (self.keys, self.values), self._buffers
        if start and buffers and not all(map(_begins, held, buffers)):
            buffers = None  # others were put in their place
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
                for buffer, known in zip(buffers, held, strict=True):
                    buffer[:, :, :start] = known
        self.packed = self._packed_for(end)
        self._buffers = buffers
        if grows and start and buffers:
            self.keys, self.values = (buffer[:, :, :start] for buffer in buffers)
            self._written.mark(self.keys, start)

    def _packed_for(self, end: int) -> PackedKeys | None:
        """The packed keys with room for ``end`` tokens, to write into; None while there are none."""
        if self.packed is not None and self.packed.capacity < end:
            return self.packed.grown(self._room_packed(end))
        if self.packed is not None and not writable(self.packed.tiles):
            return self.packed.change(Tensor.clone)
        return self.packed

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        self._buffers = None  # keys and values are others now, which do not lie in them

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end, a negative number of them.

        Raises:
            ValueError: the number is positive.
        """
        check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def _allocate(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Buffers for ``length`` keys and values such as these."""
        keys, values = (states.new_empty(*states.shape[:2], length, states.shape[3]) for states in (key, value))
        return keys, values

    def _room_packed(self, length: int) -> int:
        """Packed keys to allocate for ``length`` tokens."""
        return _room_for(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._settle()
        super().batch_repeat_interleave(repeats)
        self._change(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._settle()
        super().batch_select_indices(indices)
        self._change(lambda held: held[indices])

    def reset(self) -> None:
        """Empty the layer; transformers 5.17 fills a growing one with zeros instead."""
        super().reset()
        self._buffers = None
        self.repack(self.scorer)


def _room_for(length: int) -> int:
    """Slots to allocate for ``length`` tokens: an eighth more, not few, and whole tiles of packed keys."""
    return (length + length // 8 + 159) // 32 * 32


def _behind(held: Tensor, new: Tensor) -> Tensor:
    return torch.cat([held.to(new.device), new], dim=2)


def _begins(held: Tensor, buffer: Tensor) -> bool:
    """Whether a buffer begins with what is held."""
    return held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride() and len(held) == len(buffer)


def _serves(states: Tensor, buffer: Tensor, end: int) -> bool:
    """Whether a buffer has room for ``end`` tokens such as these and may be written to."""
    return buffer.dtype == states.dtype and buffer.shape[2] >= end and writable(buffer)


def _wider(states: Tensor, held: Tensor) -> Tensor:
    """``states`` in the dtype that both they and what is held have room in, as `torch.cat` has it."""
    if states.dtype == held.dtype:  # as ever but after autocast, and asked for every token
        return states
    return states.to(torch.promote_types(states.dtype, held.dtype))
