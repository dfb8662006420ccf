"""Room in a cache, made sure of before a forward writes into the first layer, so that layers stay in step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from fasa_flex.caches.write_tracking import counting


class CountedStaticLayer(StaticLayer):
    """A layer of a fixed length that says when it is full; transformers' own writes past its end.

    Attributes:
        written: tokens held, as far as the host knows; None where only the device knows, which counts compiled steps.
        captured: whether a CUDA graph has a step of it, which is replayed without the host's knowledge.
    """

    max_cache_len: int
    written: int | None
    captured: bool
    is_croppable = True  # before transformers 5.24, too

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.written, self.captured = None, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, in inference mode as tensors that may be written to outside of it."""
        with counting():
            super().lazy_initialization(key_states, value_states)

    def reserve(self, length: int) -> None:
        """Make sure that ``length`` more tokens fit.

        Raises:
            ValueError: they do not, as far as an eager call can tell: asking the device in every step would stall it.
        """
        if self._counts_on_device():
            return
        held = self.written
        if held is None or self.captured or held + length > self.max_cache_len:
            held = self.written = int(self.cumulative_length)
        if held + length > self.max_cache_len:
            raise ValueError(
                f"the static cache holds {held} of at most {self.max_cache_len} tokens and {length} more "
                "were given; allocate a longer one (max_cache_len)."
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, Hkv, t, D] behind those held; returns the whole buffers.

        Raises:
            ValueError: there is no room for them (`reserve`).
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
        """What `update` does once there is room."""
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end, a negative number of them; transformers' own layer can since 5.24.

        Raises:
            ValueError: the number is positive.
        """
        check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        if self.written is not None:
            self.written = max(0, self.written + tokens_to_remove)

    def reset(self) -> None:
        """Empty the layer; its buffers stay."""
        super().reset()
        self.written = 0

    def _counts_on_device(self) -> bool:
        """Whether this call is traced or captured: it runs again without the host, which must not ask now."""
        if torch.compiler.is_compiling():
            return True
        capturing = self.cumulative_length.is_cuda and torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        return capturing


def check_crop(tokens_to_remove: int) -> None:
    """Refuse a length where a number of tokens to remove is meant; transformers 5.17 took one, with a warning.

    Raises:
        ValueError: the number is positive.
    """
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop drops a negative number of tokens from the end of a cache, got {tokens_to_remove}; "
            "to keep n tokens, pass n - cache.get_seq_length()."
        )


def counted(plain: StaticLayer) -> CountedStaticLayer:
    """A layer that counts, with all that ``plain`` holds."""
    layer: Any = CountedStaticLayer(plain.max_cache_len)
    vars(layer).update(vars(plain))
    made: CountedStaticLayer = layer
    return made


def take_back(cache: Cache, last: int, length: int) -> bool:
    """Drop the ``length`` tokens that a failed forward wrote into the layers up to ``last``; False: it cannot.

    A layer with a sliding window has dropped others for them, and recurrent states have taken them in.
    """
    written: list[Any] = cache.layers[: last + 1]
    if not all(getattr(layer, "is_croppable", False) and not layer.is_sliding for layer in written):
        return False
    for layer in written:
        layer.crop(-length)
    return True


def partly_written(error: ValueError, last: int) -> ValueError:
    """The error of a forward that `take_back` cannot undo, which layers up to ``last`` hold."""
    return ValueError(
        f"{str(error).removesuffix('.')}; layers 0 to {last} of the cache hold this forward already and cannot be "
        "cropped, so go on with a new cache."
    )


def make_room(cache: Cache, length: int) -> None:
    """Make room for ``length`` more tokens in every layer, before the first one is written to.

    Plain static layers are replaced by ones that count. In a compiled graph all stays as it is.

    Raises:
        ValueError: a static layer is full, or the host has no memory for a growing one; what the cache holds is as
            before.
    """
    if torch.compiler.is_compiling():
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticLayer:
            layer = cache.layers[index] = counted(layer)
        if hasattr(layer, "reserve"):
            layer.reserve(length)
