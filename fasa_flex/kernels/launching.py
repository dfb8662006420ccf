"""How a step's kernels follow each other."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


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
