"""Cache layers that keep packed keys beside keys and values, growing and static (FASA-C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from fasa_flex.backends.triton.dispatch import writes_at_once
from fasa_flex.caches.capacity import CountedStaticLayer, check_crop
from fasa_flex.caches.pinned_memory import settle
from fasa_flex.caches.write_tracking import Written, counting, held_by
from fasa_flex.core.completion import CompletionState
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks


class KeepsPackedKeys(CacheLayerMixin):
    """The packed half of a layer: what follows every change of keys and values.

    Attributes:
        scorer: whose dimensions are packed, in its precision; one set per key/value head.
        packed: the keys at these dimensions; None while the layer is empty.
        state: what completes attention; None until an attention call asks for it.
    """

    keys: Tensor
    values: Tensor
    scorer: DominantChunks
    packed: PackedKeys | None
    state: CompletionState | None
    _written: Written

    def repack(self, scorer: DominantChunks) -> None:
        """Pack the keys anew, for other dimensions or in another precision."""
        self.scorer, self.packed, self.state = scorer, None, None
        if self.is_initialized and self.keys.numel():
            self._settle()
            rows = scorer.pack(self.keys).to(scorer.dims.device)  # where the keys may not be: FASA-M, offloading
            self.packed = PackedKeys.of(rows, scorer.dtype)
        self._mark_anew()

    def _mark_anew(self) -> None:
        """Remember the keys as this layer's own."""
        self._written = Written()
        if self.is_initialized and self.keys.numel() and not torch.compiler.is_compiling():
            self._written.mark(self.keys, self.keys.shape[2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._settle()
        super().reorder_cache(beam_idx)
        self._change(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def offload(self) -> None:
        """Move the layer to host memory."""
        super().offload()
        self._change(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        super().prefetch()
        self._change(lambda held: held.to(self.device, non_blocking=True))

    def _settle(self) -> None:
        """Let the device finish what it writes into host memory, which the host is about to read."""
        if self.is_initialized:
            settle(self.keys, self.device)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.packed = self.packed.change(change)
        if self.state is not None:
            self.state = self.state.change(change)
        self._mark_anew()

    def advance(self, key: Tensor, value: Tensor, first_order: bool, *counted: Any) -> CompletionState:
        """The state after a forward, whose ``counted`` tokens are as for `CompletionState.advance`."""
        state = self.state
        if state is None or state.key_sum.shape[2] != (key.shape[3] if first_order else 0):
            state = CompletionState.empty(key, value, first_order, self.scorer.dims.device)
        elif not torch.compiler.is_compiling() and not writable(state.covered):
            state = state.change(Tensor.clone)
        state.advance(key, value, *counted)
        self.state = state
        return state


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
            self._grow(*new, start, end)
            assert self._buffers is not None
            packed = self.packed
            keys, values = (buffer[:, :, :end] for buffer in self._buffers)
            if start and packed is not None and _write_token(*new, *self._buffers, packed, self.scorer, start):
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


class StaticPackedLayer(KeepsPackedKeys, CountedStaticLayer):
    """A layer of a fixed length with packed keys, allocated at its first update; made for compiled decoding."""

    def __init__(self, scorer: DominantChunks, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.repack(scorer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        self.repack(self.scorer)

    def repack(self, scorer: DominantChunks) -> None:
        """Pack the keys anew, for other dimensions or in another precision."""
        with counting():
            super().repack(scorer)
        if self.packed is not None and not torch.compiler.is_compiling():
            for held in (self.packed.tiles, self.packed.scales):
                if held is not None:
                    torch._dynamo.mark_static_address(held)

    def reset(self) -> None:
        """Empty the layer; its buffers stay."""
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
            return self._write_all(key_states, value_states)
        if not self._written.knows(self.keys):  # edited, or written by compiled steps
            self.repack(self.scorer)
        states = self._write_all(key_states, value_states)
        self._written.mark(self.keys, 0)
        return states

    def _write_all(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys, values and packed keys."""
        assert self.packed is not None
        packed, held = self.packed, self.cumulative_length
        states = (key_states, value_states, self.keys, self.values)
        if _write_token(*states, packed, self.scorer, held):
            held.add_(1)
            return self.keys, self.values
        slots, length = held.view(1), key_states.shape[2]
        if length > 1:
            slots = slots + torch.arange(length, device=self.device)
        packed.write(self.scorer.pack(key_states), slots)
        return self._write_states(key_states, value_states)

    def _write_states(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values, without the packed keys."""
        return super()._write(key_states, value_states)


def _write_token(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: PackedKeys,
    scorer: DominantChunks,
    length: Tensor | int,
) -> bool:
    """Write a decoded token behind ``length`` others by one kernel; False where it cannot, and nothing is written."""
    dims = scorer.dims
    if not writes_at_once(key, value, keys, values, packed, dims):
        return False
    from fasa_flex.backends.triton.writing import write_token  # Triton is there with CUDA only

    scales = None if packed.scales is None else packed.scales.squeeze(3)
    mean_key = None if scorer.mean_key is None else scorer.mean_key.contiguous()
    write_token(key, value, keys, values, packed.tiles.squeeze(4), scales, dims.contiguous(), mean_key, length)
    return True


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


def writable(buffer: Tensor) -> bool:
    """Tensors made in inference mode may not be written outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def pack_layer(cache: Cache, layer: int, scorer: object, growing: bool = True) -> None:
    """Let a layer of any cache keep packed keys, if it is of a kind that can and ``scorer`` scores dimensions of keys.

    A plain growing layer, unless ``growing`` is False, or static one is replaced by one that packs, with the keys and
    values it holds. One that packs already is packed anew where ``scorer`` scores other dimensions. In a compiled graph
    all stays as it is.
    """
    if not isinstance(scorer, DominantChunks) or layer >= len(cache.layers) or torch.compiler.is_compiling():
        return
    held = cache.layers[layer]
    if type(held) is DynamicLayer and growing:
        held = _adopt(held, PackedLayer(scorer))
    elif type(held) in (StaticLayer, CountedStaticLayer):
        held = _adopt(held, StaticPackedLayer(scorer, held.max_cache_len))
    elif not isinstance(held, KeepsPackedKeys):
        return
    cache.layers[layer] = held
    if held.scorer is not scorer:
        if held.scorer.ranks_as(scorer):
            held.scorer, held.state = scorer, None  # the cache may have changed since, unseen by attention
        else:
            held.repack(scorer)


def packed_keys(cache: Cache, layer: int, scorer: object) -> PackedKeys | None:
    """The packed keys of a layer, if they are what ``scorer`` scores."""
    held = cache.layers[layer]
    return held.packed if isinstance(held, KeepsPackedKeys) and held.scorer is scorer else None


def advance_state(
    cache: Cache | None, layer: int, scorer: object, key: Tensor, value: Tensor, first_order: bool, *counted: Any
) -> CompletionState | None:
    """The completion's state of a layer after a forward; None where the layer keeps none for ``scorer``.

    Args:
        first_order: whether it holds the covariance, and not the mean value alone.
        counted: the forward's tokens, as for `CompletionState.advance`.
    """
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if not isinstance(held, KeepsPackedKeys) or held.scorer is not scorer:
        return None
    return held.advance(key, value, first_order, *counted)


def _adopt(plain: CacheLayerMixin, layer: Any) -> Any:
    """``layer`` with all that ``plain`` holds."""
    scorer = layer.scorer
    vars(layer).update(vars(plain))
    layer.repack(scorer)
    return layer


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's cache holds the keys that attention sees; MLA's holds the latent they are expanded from."""
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is None
