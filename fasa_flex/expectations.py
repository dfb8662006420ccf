"""What fasa_flex takes from transformers by name, said in one place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType
from typing import Any

from transformers import Cache, GenerationMixin, PreTrainedModel

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


_PREFILL: CodeType | None = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)
_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__


def reads_prompt() -> bool:
    """Whether `generate` reads its prompt, or a part of it, in the forward that this is called from.

    Nothing that it hands to a model says so, and a prompt may end on a chunk of one token. An assistant that goes on
    with its own candidates reads no prompt.
    """
    frame = _find(sys._getframe(1), _PREFILL)
    return frame is not None and bool(frame.f_locals.get("is_first_iteration", True))


def generating(threads: Iterable[int]) -> int:
    """How many of these threads are in `generate` now."""
    frames = sys._current_frames()
    return sum(_find(frames.get(thread), _GENERATE) is not None for thread in threads)


def _find(frame: FrameType | None, code: CodeType | None) -> FrameType | None:
    """The innermost call of ``code`` that ``frame`` is in."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
