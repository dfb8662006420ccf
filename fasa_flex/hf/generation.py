"""State of `generate`, read from the call stack because transformers does not pass it to the model."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable
from types import CodeType, FrameType

from transformers import Cache, DynamicCache, GenerationMixin

_PREFILL: CodeType | None = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)
_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__

WAITING, MANY = "cuda", 256
"""Device type, and tokens of an answer, from which `tell_of_static_cache` warns."""


def reads_prompt() -> bool:
    """Whether the calling forward runs inside the prefill of `generate`, or of one chunk of its prompt.

    The last chunk may be a single token. An assistant model that continues its own candidates reads no prompt.
    """
    frame = find_frame(sys._getframe(1), _PREFILL)
    return frame is not None and bool(frame.f_locals.get("is_first_iteration", True))


def tell_of_static_cache(cache: Cache | None) -> bool:
    """Warn if `generate` is about to decode many tokens on a GPU with a cache that grows; return whether it warned.

    Uncompiled, such a step waits for Python: of a model with 8 layers it takes three times as long as on a static
    cache, which transformers compiles (evals/results/generate_cuda.json). An evaluation is not warned: its answers
    should be those of the uncompiled model.
    """
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return False
    frame = find_frame(sys._getframe(1), _PREFILL)
    if frame is None:
        return False
    model, prompt, config = (frame.f_locals.get(name) for name in ("self", "input_ids", "generation_config"))
    if model is None or prompt is None or model.device.type != WAITING or _evaluates(frame):
        return False
    tokens = (getattr(config, "max_length", None) or 0) - prompt.shape[1]
    if tokens < MANY:
        return False
    warnings.warn(
        f"generate decodes up to {tokens} tokens on a cache that grows, where each token waits for Python; pass "
        'cache_implementation="static" to generate, which transformers then compiles at its first call.',
        stacklevel=2,
    )
    return True


def _evaluates(frame: FrameType | None) -> bool:
    """Whether lm-evaluation-harness runs the frame."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "lm_eval":
            return True
        frame = frame.f_back
    return False


def generating(threads: Iterable[int]) -> int:
    """Number of these threads that are in `generate` now."""
    frames = sys._current_frames()
    return sum(find_frame(frames.get(thread), _GENERATE) is not None for thread in threads)


def find_frame(frame: FrameType | None, code: CodeType | None) -> FrameType | None:
    """Find the innermost frame that runs ``code``, from ``frame`` outwards; None: there is none."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
