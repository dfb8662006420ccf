"""Let the layers of any cache keep packed keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from fasa_flex.caches.capacity import CountedStaticLayer
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.core.scoring import DominantChunks


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


def _adopt(plain: CacheLayerMixin, layer: Any) -> Any:
    """``layer`` with all that ``plain`` holds."""
    scorer = layer.scorer
    vars(layer).update(vars(plain))
    layer.repack(scorer)
    return layer


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's cache holds the keys that attention sees; MLA's holds the latent they are expanded from."""
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is None
