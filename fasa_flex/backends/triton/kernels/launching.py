"""How a step's kernels follow each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """To be called before anything else: with ``OVERLAP`` a kernel is launched while the one before it still runs.

    So its programs stand ready when that one's results do (programmatic dependent launch, which Hopper brought). The
    kernels of a step are short, and a GPU would idle between two of them.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def overlapping(device: torch.device) -> tuple[bool, dict[str, bool]]:
    """What ``OVERLAP`` is on a device, and the launch options that go with it."""
    overlap = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return overlap, {"launch_pdl": True} if overlap else {}


def on_their_device(launch: _Function) -> _Function:
    """Let ``launch`` run with the GPU of the tensors that it is given as the current one, on which Triton launches.

    It need not be: a model may be spread over several. Keys and values may be the host's.
    """

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        theirs = (arg.get_device() for arg in args if isinstance(arg, Tensor) and arg.is_cuda)
        with torch.cuda.device(next(theirs, -1)):
            return launch(*args)

    return cast(_Function, run)


def parts_of(length: int, size: int) -> int:
    """Parts of ``size`` that cover ``length``; Triton's own, and its power of two, take microseconds each call."""
    return -(-length // size)


def power_of_two(number: int, least: int = 1) -> int:
    """The first power of two from ``number`` on, ``least`` at the least, which is one too."""
    return max(least, 1 << (number - 1).bit_length())
