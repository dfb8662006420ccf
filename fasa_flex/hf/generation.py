"""State of `generate`, read from the call stack because transformers does not pass it to the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import CodeType, FrameType

from transformers import GenerationMixin

_PREFILL: CodeType | None = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)
_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__


def reads_prompt() -> bool:
    """Whether the calling forward runs inside the prefill of `generate`, or of one chunk of its prompt.

    The last chunk may be a single token. An assistant model that continues its own candidates reads no prompt.
    """
    frame = find_frame(sys._getframe(1), _PREFILL)
    return frame is not None and bool(frame.f_locals.get("is_first_iteration", True))


def calling_generate() -> FrameType | None:
    """The frame of the `generate` that this thread is in, the innermost; None: it is in none."""
    return find_frame(sys._getframe(1), _GENERATE)


def evaluates(frame: FrameType | None) -> bool:
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
