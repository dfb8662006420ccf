"""Kinds of a model's layers, by the cache that transformers makes for them: which have keys that FASA can select from.

A layer with full attention has a growing cache of keys; in a hybrid layer a recurrent state lies beside them. All other
kinds stay as they are: sliding windows, recurrent and convolutional layers, attention with a selection of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionAndFullAttentionLayer

WINDOW = "sliding window, which bounds its keys already"
STATE = "no keys in the cache, as in a recurrent, convolutional or feed-forward layer"
_WHOLE = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def other_kinds(config: Any) -> dict[int, str]:
    """Layers that do not select from a growing cache of keys, each with the reason.

    Args:
        config: the model's config.

    Raises:
        ValueError: transformers makes no cache for this config.
    """
    try:
        cached: list[Any] = DynamicCache(config=config).layers
    except Exception as error:  # an unknown kind of layer is a KeyError, a config without layers an AttributeError
        raise ValueError(
            f"transformers makes no cache from the config of {config.model_type} ({type(error).__name__}: {error}); "
            "use a decoder-only RoPE model, such as Llama."
        ) from error
    reasons = {layer: _other(kind) for layer, kind in enumerate(cached)}
    return {layer: reason for layer, reason in reasons.items() if reason is not None}


def _other(cached: Any) -> str | None:
    if getattr(cached, "is_sliding", False):
        return WINDOW
    if not isinstance(cached, CacheLayerMixin):
        return STATE
    if type(cached) not in _WHOLE:
        return f"keys that the model itself selects or compresses ({type(cached).__name__})"
    return None


def sized_config(config: Any) -> Any:
    """Config with the sizes of the layers that FASA can serve: the text config, unless it states sizes by layer."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return text
    return text.per_layer_config[next(iter(selectable_layers(config)), 0)]


def selectable_layers(config: Any) -> list[int]:
    """Numbers of the layers whose keys FASA can select from, as far as the config tells."""
    others = other_kinds(config)
    return [layer for layer in range(config.get_text_config().num_hidden_layers) if layer not in others]


def why_unsupported(config: Any) -> str | None:
    """Reason for which FASA can serve no layer of a model, as far as the config tells; None: it tells none."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if text.model_type == "bloom" or getattr(getattr(text, "attn_config", text), "alibi", False):
        return "adds ALiBi to its logits, a bias that FASA's scores and attention leave out"
    others = other_kinds(config)
    selectable = selectable_layers(config)
    if not selectable and WINDOW not in others.values():
        kinds = ", ".join(sorted(set(getattr(text, "layer_types", None) or ()))) or "recurrent"
        if set(others.values()) <= {STATE}:
            return f"has layers of type {kinds}, which keep no keys and values to select from"
        return f"has layers of type {kinds}, which select or compress their keys by themselves"
    if getattr(text, "is_heterogeneous", False):
        sizes = {_head_size(text.per_layer_config[layer]) for layer in selectable}
        if len(sizes) > 1:
            stated = ", ".join(map(str, sorted(sizes, key=str)))
            return f"has heads of different sizes (heads, key/value heads, dimensions) in its layers: {stated}"
    elif getattr(text, "num_attention_heads", None) is None:
        return "has no attention heads (a recurrent model), so it has no queries and keys to compare"
    return None


def _head_size(config: Any) -> tuple[Any, ...]:
    return tuple(getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
