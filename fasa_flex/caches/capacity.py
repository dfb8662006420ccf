"""Checks of the free space in all layers before a forward writes to any, so that a failure leaves them equally long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, StaticLayer

from fasa_flex.caches.write_tracking import counting


class CountedStaticLayer(StaticLayer):
    """A static layer that raises an error when it is full; transformers' own writes past its end.

    Attributes:
        written: number of tokens in the layer; None after compiled steps, which count on the device alone.
        captured: whether a CUDA graph contains a step of this layer; the host does not notice its replays.
    """

    max_cache_len: int
    written: int | None
    captured: bool
    is_croppable = True  # before transformers 5.24, too

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.written, self.captured = None, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, in inference mode as normal tensors, so that code outside it can write to them."""
        with counting():
            super().lazy_initialization(key_states, value_states)

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        A compiled or captured step is not checked: reading the count from the device in every step would stall it.

        Raises:
            ValueError: they do not fit.
        """
        if self._counts_on_device():
            return
        written = self.written
        if written is None or self.captured or written + length > self.max_cache_len:
            written = self.written = int(self.cumulative_length)
        if written + length > self.max_cache_len:
            raise _is_full(written, self.max_cache_len, length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; return the complete buffers.

        Raises:
            ValueError: they do not fit (`reserve`).
        """
        length = key_states.shape[2]
        self.reserve(length)
        states = self._write(key_states, value_states)
        if self._counts_on_device():
            self.written = None
        elif self.written is not None:
            self.written += length
        return states

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values after `reserve` has succeeded."""
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens from the end; transformers' own layer does so from 5.24 on.

        Raises:
            ValueError: ``tokens_to_remove`` is positive.
        """
        check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        if self.written is not None:
            self.written = max(0, self.written + tokens_to_remove)

    def reset(self) -> None:
        """Remove all tokens; the buffers stay allocated."""
        super().reset()
        self.written = 0

    def _counts_on_device(self) -> bool:
        """Whether this call is traced or captured; the host must not read the token count from the device then."""
        if torch.compiler.is_compiling():
            return True
        capturing = self.cumulative_length.is_cuda and torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        return capturing


def check_crop(tokens_to_remove: int) -> None:
    """Refuse a length to crop to instead of a negative token count; transformers 5.17 took a length, with a warning.

    Raises:
        ValueError: ``tokens_to_remove`` is positive.
    """
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop drops a negative number of tokens from the end of a cache, got {tokens_to_remove}; "
            "to keep n tokens, pass n - cache.get_seq_length()."
        )


def counted(plain: StaticLayer) -> CountedStaticLayer:
    """Make a `CountedStaticLayer` with the tensors and settings of ``plain``."""
    copy: Any = CountedStaticLayer(plain.max_cache_len)
    vars(copy).update(vars(plain))
    layer: CountedStaticLayer = copy
    return layer


def slots_written(cache: Cache, layer: int) -> int | None:
    """Number of slots that a layer of a cache has written; None for a layer that shares the keys of another."""
    cached = cache.layers[layer] if layer < len(cache.layers) else None
    return None if cached is not None and not hasattr(cached, "get_seq_length") else int(cache.get_seq_length(layer))


def last_written(cache: Cache, first: int) -> int:
    """Number of the last layer that a forward has written to when it comes to its first attention, in layer ``first``.

    Recurrent layers before it are written, and the recurrent state of a hybrid layer. Before layer 0: -1.
    """
    own = first < len(cache.layers) and isinstance(cache.layers[first], LinearAttentionCacheLayerMixin)
    return first if own else first - 1


def take_back(cache: Cache, last: int, length: int) -> bool:
    """Remove the ``length`` tokens that a failed forward wrote into the layers up to ``last``.

    Returns:
        False if the layers cannot be restored: a sliding window has dropped older tokens, or a recurrent state has
        absorbed the new ones.
    """
    written: list[Any] = cache.layers[: last + 1]
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in written):
        return False
    if not all(getattr(layer, "is_croppable", False) and not getattr(layer, "is_sliding", False) for layer in written):
        return False
    for layer in written:
        layer.crop(-length)
    return True


def partly_written(error: ValueError, last: int) -> ValueError:
    """Extend the error of a failed forward that `take_back` cannot remove from the layers up to ``last``."""
    return ValueError(
        f"{str(error).removesuffix('.')}; layers 0 to {last} of the cache hold this forward already and cannot be "
        "cropped, so go on with a new cache."
    )


def make_room(cache: Cache, length: int) -> None:
    """Reserve space for ``length`` more tokens in every layer before the first one is written.

    Plain static layers are replaced by `CountedStaticLayer`. In a compiled graph nothing happens.

    Raises:
        ValueError: a static layer is full, or a growing one gets no host memory; the cache's contents are unchanged.
    """
    if torch.compiler.is_compiling():
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticLayer:
            layer = cache.layers[index] = counted(layer)
        if hasattr(layer, "reserve"):
            layer.reserve(length)
        elif isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, StaticLayer):
            _check_room(layer, length)


def _check_room(layer: Any, length: int) -> None:
    """Check the room of a static layer that holds a recurrent state, too, and is not replaced by a counted one."""
    written = int(layer.cumulative_length) if layer.is_initialized and not layer.is_sliding else 0
    if written + length > layer.max_cache_len and not layer.is_sliding:
        raise _is_full(written, layer.max_cache_len, length)


def _is_full(written: int, most: int, length: int) -> ValueError:
    return ValueError(
        f"the static cache holds {written} of at most {most} tokens and {length} more were given; "
        "allocate a longer one (max_cache_len)."
    )
