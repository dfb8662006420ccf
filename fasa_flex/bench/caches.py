"""Static caches for the step benchmark: filled without a prefill, rewound after every step, and counted in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasa_flex.bench.shapes import Shape
from fasa_flex.caches.capacity import CountedStaticLayer
from fasa_flex.caches.host_layers import StaticHostLayer

_PIECE = 4096
_SHARED = ("keys", "values", "dtype", "device", "batch_size", "num_heads", "k_head_dim", "v_head_dim")


@torch.no_grad()
def fill(cache: Any, layers: int, shape: Shape, batch: int, length: int, dtype: torch.dtype, device: Any) -> None:
    """Write ``length`` random tokens into every layer, the same ones; one in host memory gets them at once."""
    generator = torch.Generator(device).manual_seed(0)
    pieces: list[list[Tensor]] = []
    for start in range(0, length, _PIECE):
        size = (batch, shape.kv_heads, min(_PIECE, length - start), shape.head_dim)
        pieces.append([torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2)])
        if not isinstance(cache.layers[-1], StaticHostLayer):
            _append(cache, layers, *pieces.pop())
    if pieces:
        _append(cache, layers, *(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))


def _append(cache: Any, layers: int, key: Tensor, value: Tensor) -> None:
    for layer in range(layers):
        cache.update(key, value, layer)


def share(cache: Any, source: Any, length: int) -> bool:
    """Let ``cache`` hold the keys, values and packed keys of ``source``, which is filled; False where it cannot."""
    pairs = list(zip(cache.layers, source.layers, strict=True))
    for mine, theirs in pairs:
        placed = isinstance(mine, StaticHostLayer) == isinstance(theirs, StaticHostLayer)
        if not placed or not theirs.is_initialized or theirs.keys.shape[2] != length:
            return False
    for mine, theirs in pairs:
        for name in (*_SHARED, "packed", "held", "rows") if type(mine) is type(theirs) else _SHARED:
            if hasattr(theirs, name):
                setattr(mine, name, getattr(theirs, name))
        mine.cumulative_length = mine.cumulative_length.to(theirs.keys.device)
        torch._dynamo.mark_static_address(mine.cumulative_length)
        mine.is_initialized = True
    return True


def rewind(cache: Any, length: int) -> None:
    """Make every layer hold ``length`` tokens again."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
        if isinstance(layer, CountedStaticLayer):
            layer.written = length


def forget(cache: Any, share: float) -> None:
    """Let the device forget a share of the rows that it holds of the host's keys and values."""
    for layer in cache.layers:
        if isinstance(layer, StaticHostLayer) and layer.held is not None:
            layer.held.forget(share)


def nbytes(cache: Any) -> dict[str, int]:
    """Bytes of all tensors that a cache holds, by the type of their device."""
    mapped = {
        states.untyped_storage().data_ptr()
        for layer in cache.layers
        if isinstance(layer, StaticHostLayer)
        for states in (layer.keys, layer.values)
    }
    storages: dict[tuple[str, int], int] = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        device = "cpu" if storage.data_ptr() in mapped else tensor.device.type
        storages[device, storage.data_ptr()] = storage.nbytes()
    total: dict[str, int] = {}
    for (device, _), size in storages.items():
        total[device] = total.get(device, 0) + size
    return total


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith(("transformers.cache", "fasa_flex")):
        yield from _tensors(vars(value), seen)
