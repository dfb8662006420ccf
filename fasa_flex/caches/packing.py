"""Replacement of the layers of any cache by layers that keep packed keys."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    StaticLayer,
)

from fasa_flex.caches.capacity import CountedStaticLayer
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.state_layers import PackedStateLayer, StaticPackedStateLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.core.scoring import DominantChunks, Scorer

_GROWING = {DynamicLayer: PackedLayer, LinearAttentionAndFullAttentionLayer: PackedStateLayer}
_STATIC = {
    StaticLayer: StaticPackedLayer,
    CountedStaticLayer: StaticPackedLayer,
    LinearAttentionAndStaticFullAttentionLayer: StaticPackedStateLayer,
}
"""For each kind of layer, the kind with packed keys that replaces it."""


def pack_layer(cache: Cache, layer: int, scorer: Scorer | None, growing: bool = True) -> KeepsPackedKeys | None:
    """Let layer number ``layer`` of a cache keep packed keys for ``scorer``, if this is a `DominantChunks`.

    A plain static layer, and a plain growing one unless ``growing`` is False, is replaced by a layer with packed keys
    that takes over its keys and values. A layer with packed keys packs them again if ``scorer`` reads other dimensions.
    Other kinds of layers stay as they are, and in a compiled graph every layer does.

    Returns:
        the layer with packed keys of ``scorer``; None if it stayed as it was without them.
    """
    if not isinstance(scorer, DominantChunks) or layer >= len(cache.layers) or torch.compiler.is_compiling():
        return None
    cached = cache.layers[layer]
    if type(cached) in _STATIC or (growing and type(cached) in _GROWING):
        cached = cache.layers[layer] = packed_layer(cached, scorer)
    elif not isinstance(cached, KeepsPackedKeys):
        return None
    if cached.scorer is not scorer:
        if cached.scorer.ranks_as(scorer):
            cached.scorer, cached.state = scorer, None  # forwards in between may not have updated the state
        else:
            cached.repack(scorer)
    return cached


def packed_layer(plain: CacheLayerMixin, scorer: DominantChunks) -> KeepsPackedKeys:
    """Make a layer that packs keys for ``scorer``, with the tensors and settings of ``plain`` (`packable_layers`)."""
    kind = type(plain)
    layer: KeepsPackedKeys = _STATIC[kind](scorer, plain.max_cache_len) if kind in _STATIC else _GROWING[kind](scorer)
    layer.__dict__.update(vars(plain))
    layer.repack(scorer)
    return layer


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's cache holds keys; with MLA it holds the latents that keys are computed from."""
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is None


def packable_layers(model: PreTrainedModel, alone: bool) -> list[int]:
    """Numbers of the layers whose cache can keep packed keys; ``alone``: those without a state beside the keys."""
    kinds = (DynamicLayer,) if alone else tuple(_GROWING)
    layers = DynamicCache(config=model.config).layers
    return [number for number, layer in enumerate(layers) if type(layer) in kinds]
