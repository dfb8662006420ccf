"""What fasa_flex takes from transformers by name, said in one place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache, PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""How an attention module is handed its cache: since transformers 5.24, before it, and in GPT-NeoX."""


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the keyword arguments of an attention module; None where it is handed none.

    Raises:
        ValueError: a cache of another kind, such as the paged one of continuous batching.
    """
    for name in CACHE_NAMES:
        cache = arguments.get(name)
        if isinstance(cache, Cache):
            return cache
        if cache is not None:
            raise ValueError(
                f"FASA reads a transformers Cache and the model was handed a {type(cache).__name__}, as continuous "
                "batching does; pass a Cache such as DynamicCache, or disable() FASA first."
            )
    return None


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """``cache`` under the name that the model's forward and `generate` have for it, to be passed on with ``**``.

    It is ``cache`` since transformers 5.24 and ``past_key_values`` before, which a later one warns of.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
