"""What `generate` is doing, read off the calls that are under way: it tells nothing of it to a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import CodeType, FrameType

from transformers import GenerationMixin

_PREFILL: CodeType | None = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)
_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__


def reads_prompt() -> bool:
    """Whether `generate` reads its prompt, or a part of it, in the forward that this is called from.

    A prompt may end on a chunk of one token. An assistant that goes on with its own candidates reads no prompt.
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
