"""Caches of a tiny model, filled, and what they must hold."""

from __future__ import annotations

from typing import Any

import torch
from cases import plain
from generation import profile_of
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fasa_flex import FasaCache
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.core.packed_keys import as_packed
from fasa_flex.hf.compatibility import cache_argument

CONFIG = plain(n_fac=6, n_tip=3)


def packed_layers(cache: Cache) -> list[PackedLayer | StaticPackedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PackedLayer | StaticPackedLayer)]


def filled(model: PreTrainedModel, rows: int = 2, length: int = 20, **options: Any) -> FasaCache:
    cache = FasaCache(model, profile_of(model), CONFIG, **options)
    with torch.no_grad():
        model(torch.arange(rows * length).view(rows, length) % 60 + 1, **cache_argument(model, cache))
    return cache


def assert_packed(cache: Cache) -> None:
    """Every packed layer holds what packing its keys anew gives."""
    assert packed_layers(cache)
    for layer in packed_layers(cache):
        assert layer.packed is not None
        length = int(layer.get_seq_length())
        anew = as_packed(layer.scorer.pack(layer.keys[:, :, :length]), layer.scorer.dtype)
        assert layer.packed.rows(length).equal(anew)


Held = list[tuple[int, list[Tensor]]]


def held(cache: Cache) -> Held:
    """A copy of what every layer holds: tokens, and their keys, values and packed keys."""
    found: Held = []
    for layer in cache.layers:
        length = int(layer.get_seq_length())
        states = [states[:, :, :length].clone() for states in (layer.keys, layer.values) if length]
        packed = getattr(layer, "packed", None)
        found.append((length, [*states, packed.rows(length).clone()] if packed is not None else states))
    return found


def assert_holds(cache: Cache, before: Held) -> None:
    """Every layer of the cache holds what it held then."""
    for (length, states), (length_before, states_before) in zip(held(cache), before, strict=True):
        assert length == length_before
        assert all(now.equal(then) for now, then in zip(states, states_before, strict=bool(length)))
