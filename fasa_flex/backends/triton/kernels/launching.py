"""Launch options of the kernels: programmatic dependent launch, the current device, and sizes."""

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
    """Programmatic dependent launch (sm_90 and later) if ``OVERLAP``; each kernel calls this or `begin_in_turn` first.

    The next kernel is launched while this one runs, and waits here for its results. The kernels of a step are so short
    that the GPU would idle between two of them.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin_in_turn(OVERLAP: tl.constexpr):
    """`begin`, but the next kernel starts only when this one has waited.

    So the next kernel may read, before it waits in its turn, all that is older than the results of this one.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def overlapping(device: torch.device) -> tuple[bool, dict[str, bool]]:
    """The kernels' argument ``OVERLAP`` on a device, and the launch options for it."""
    overlap = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return overlap, {"launch_pdl": True} if overlap else {}


@functools.cache
def block_that_fits(device: torch.device, row: int, most: int) -> int:
    """Keys of a block of attention, `fitting` the device's shared memory; ``row``: bytes of a key and its value."""
    if device.type != "cuda":
        return most
    return fitting(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"], row, most)


def fitting(shared: int, row: int, most: int) -> int:
    """The largest power of two of rows, at most ``most``, of which seven eighths of ``shared`` bytes hold two blocks.

    Triton loads a block of keys and values while it multiplies another, and keeps queries and weights beside them.
    """
    rows = max(16, shared * 7 // 8 // (2 * row))  # a matrix product needs 16
    return min(most, 1 << (rows.bit_length() - 1))


def on_their_device(launch: _Function) -> _Function:
    """Make the GPU of ``launch``'s tensors current during the call, since Triton launches on the current device.

    A model may be spread over several GPUs. Keys and values may be in host memory.
    """

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        devices = (arg.get_device() for arg in args if isinstance(arg, Tensor) and arg.is_cuda)
        with torch.cuda.device(next(devices, -1)):
            return launch(*args)

    return cast(_Function, run)


def parts_of(length: int, size: int) -> int:
    """``ceil(length / size)``; like `power_of_two` faster than Triton's function, which takes microseconds."""
    return -(-length // size)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``least``, itself a power of two."""
    return max(least, 1 << (number - 1).bit_length())
