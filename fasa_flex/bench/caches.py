"""Static caches of the step benchmark: fill them without a prefill, rewind them after each step, count their bytes."""

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
    """Write the same ``length`` random tokens into every layer, in pieces, or in one piece for host memory."""
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
    """Let ``cache`` use the keys, values and packed keys of the filled ``source``; False if the two differ in kind."""
    pairs = list(zip(cache.layers, source.layers, strict=True))
    for layer, filled in pairs:
        same_place = isinstance(layer, StaticHostLayer) == isinstance(filled, StaticHostLayer)
        if not same_place or not filled.is_initialized or filled.keys.shape[2] != length:
            return False
    for layer, filled in pairs:
        for name in (*_SHARED, "packed", "held", "rows") if type(layer) is type(filled) else _SHARED:
            if hasattr(filled, name):
                setattr(layer, name, getattr(filled, name))
        layer.cumulative_length = layer.cumulative_length.to(filled.keys.device)
        torch._dynamo.mark_static_address(layer.cumulative_length)
        layer.is_initialized = True
    return True


def rewind(cache: Any, length: int) -> None:
    """Set the length of every layer back to ``length`` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
        if isinstance(layer, CountedStaticLayer):
            layer.written = length


def forget(cache: Any, share: float) -> None:
    """Mark a share of the rows on the device as absent, so that they are fetched from host memory again."""
    for layer in cache.layers:
        if isinstance(layer, StaticHostLayer) and layer.resident is not None:
            layer.resident.forget(share)


def nbytes(cache: Any) -> dict[str, int]:
    """Bytes of a cache's tensors by device type; mapped host memory counts as ``cpu``."""
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
