"""Cache layers that keep packed keys beside keys and values, growing and static (FASA-C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from fasa_flex.packing import PackedDtype, PackedKeys
from fasa_flex.scoring import DominantChunks


class KeepsPackedKeys(CacheLayerMixin):
    """The packed half of a layer: what follows every change of keys and values.

    Attributes:
        scorer: whose dimensions are packed; one set per key/value head.
        packed: the keys at these dimensions; None while the layer is empty.
    """

    keys: Tensor
    values: Tensor
    scorer: DominantChunks
    dtype_packed: PackedDtype | None
    packed: PackedKeys | None

    def repack(self, scorer: DominantChunks, dtype: PackedDtype | None) -> None:
        """Pack the keys anew, for other dimensions."""
        self.scorer, self.dtype_packed, self.packed = scorer, dtype, None
        if self.is_initialized and self.keys.numel():
            rows = scorer.pack(self.keys).to(scorer.dims.device)  # where the keys may not be: FASA-M, offloading
            self.packed = PackedKeys.of(rows, dtype)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
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

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.packed = self.packed.change(change)


class PackedLayer(KeepsPackedKeys, DynamicLayer):
    """A growing layer with packed keys.

    It grows in place, in buffers with an eighth to spare, where `DynamicLayer` copies all keys and values every time.
    """

    def __init__(self, scorer: DominantChunks, dtype: PackedDtype | None = None) -> None:
        super().__init__()
        self._buffers: dict[str, Tensor] = {}
        self.repack(scorer, dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, start)
        self.values = self._append("values", self.values, value_states, start)
        rows = self.scorer.pack(key_states.detach())
        end = start + rows.shape[2]
        if self.packed is None:
            self.packed = PackedKeys.of(rows, self.dtype_packed, capacity=_room_for(end))
        else:
            if self.packed.capacity < end:
                self.packed = self.packed.grown(_room_for(end))
            elif not writable(self.packed.tiles):
                self.packed = self.packed.change(Tensor.clone)
            self.packed.write(rows, torch.arange(start, end, device=rows.device))
        return self.keys, self.values

    def _append(self, name: str, held: Tensor, new: Tensor, start: int) -> Tensor:
        """``held`` with ``new`` behind it: in its buffer, if it is the buffer's beginning and there is room."""
        if torch.compiler.is_compiling() or new.requires_grad or held.requires_grad:
            return torch.cat([held, new], dim=2) if start else new
        end = start + new.shape[2]
        buffer = self._buffers.get(name)
        if buffer is None or not _begins(held, buffer) or buffer.shape[2] < end or not writable(buffer):
            buffer = self._allocate(new, _room_for(end))
            if start:
                buffer[:, :, :start] = held
            self._buffers[name] = buffer
        buffer[:, :, start:end].copy_(new, non_blocking=True)
        return buffer[:, :, :end]

    def _allocate(self, like: Tensor, length: int) -> Tensor:
        return like.new_empty(*like.shape[:2], length, like.shape[3])

    def offload(self) -> None:
        """Move the layer to host memory."""
        super().offload()
        self._buffers.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self._change(lambda held: held[indices])

    def reset(self) -> None:
        """Empty the layer; transformers 5.17 fills a growing one with zeros instead."""
        super().reset()
        self._buffers.clear()
        self.repack(self.scorer, self.dtype_packed)


class StaticPackedLayer(KeepsPackedKeys, StaticLayer):
    """A layer of a fixed length with packed keys, allocated at its first update; made for compiled decoding.

    Attributes:
        written: tokens held, as far as eager calls know without asking the device.
    """

    def __init__(self, scorer: DominantChunks, max_cache_len: int, dtype: PackedDtype | None = None) -> None:
        super().__init__(max_cache_len)
        self.written = 0
        self.repack(scorer, dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        self.repack(self.scorer, self.dtype_packed)

    def repack(self, scorer: DominantChunks, dtype: PackedDtype | None) -> None:
        """Pack the keys anew, for other dimensions."""
        super().repack(scorer, dtype)
        if self.packed is not None and not torch.compiler.is_compiling():
            self.written = int(self.cumulative_length)
            for held in (self.packed.tiles, self.packed.scales):
                if held is not None:
                    torch._dynamo.mark_static_address(held)

    def reset(self) -> None:
        """Empty the layer; its buffers stay."""
        super().reset()
        self.written = 0
        if self.packed is not None:
            self.packed.change(Tensor.zero_)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, Hkv, t, D] behind those held; returns the whole buffers.

        Raises:
            ValueError: there is no room for them, as far as eager calls tell: asking the device would stall it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[2]
        if not torch.compiler.is_compiling():
            if self.written + length > self.max_cache_len:
                self.written = int(self.cumulative_length)  # ask the device, which has the last word, only now
            if self.written + length > self.max_cache_len:
                raise ValueError(
                    f"the static cache holds {self.written} of at most {self.max_cache_len} tokens and {length} more "
                    "were given; allocate a longer one (max_cache_len)."
                )
            self.written += length
        slots = self.cumulative_length.view(1)
        if length > 1:
            slots = slots + torch.arange(length, device=self.device)
        assert self.packed is not None
        self.packed.write(self.scorer.pack(key_states), slots)
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return states


def _room_for(length: int) -> int:
    """Slots to allocate for ``length`` tokens: an eighth more, not few, and whole tiles of packed keys."""
    return (length + length // 8 + 159) // 32 * 32


def _begins(held: Tensor, buffer: Tensor) -> bool:
    return (
        held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride() and held.shape[0] == buffer.shape[0]
    )


def writable(buffer: Tensor) -> bool:
    """Tensors made in inference mode may not be written outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def pack_layer(cache: Cache, layer: int, scorer: object, dtype: PackedDtype | None) -> None:
    """Let a layer of any cache keep packed keys, if it is of a kind that can and ``scorer`` scores dimensions of keys.

    A plain growing or static layer is replaced by one that packs, with the keys and values it holds. One that packs
    already is packed anew where ``scorer`` scores other dimensions. In a compiled graph all stays as it is.
    """
    if not isinstance(scorer, DominantChunks) or layer >= len(cache.layers) or torch.compiler.is_compiling():
        return
    held = cache.layers[layer]
    if type(held) is DynamicLayer:
        held = _adopt(held, PackedLayer(scorer, dtype))
    elif type(held) is StaticLayer:
        held = _adopt(held, StaticPackedLayer(scorer, held.max_cache_len, dtype))
    elif not isinstance(held, KeepsPackedKeys):
        return
    cache.layers[layer] = held
    if held.scorer is not scorer:
        same = held.dtype_packed == dtype and torch.equal(held.scorer.dims.cpu(), scorer.dims.cpu())
        if same:
            held.scorer = scorer
        else:
            held.repack(scorer, dtype)


def packed_keys(cache: Cache, layer: int, scorer: object) -> PackedKeys | None:
    """The packed keys of a layer, if they are what ``scorer`` scores."""
    held = cache.layers[layer]
    return held.packed if isinstance(held, KeepsPackedKeys) and held.scorer is scorer else None


def _adopt(plain: CacheLayerMixin, layer: Any) -> Any:
    """``layer`` with all that ``plain`` holds."""
    scorer, dtype = layer.scorer, layer.dtype_packed
    vars(layer).update(vars(plain))
    layer.repack(scorer, dtype)
    return layer


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's cache holds the keys that attention sees; MLA's holds the latent they are expanded from."""
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is None
