"""Profile of one call: its kernels (on CUDA) or operators (elsewhere), with their times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fasa_flex.bench.timing import synchronize

_MOST = 12
_NAME = 80


def launches_of(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Run one call, or one replay of its graph, under torch's profiler; warm it up first.

    Returns:
        ``count`` of launches, their ``seconds`` (self time, so that nested operators are not counted twice), and the
        ``longest`` by name, each with its ``count`` and ``seconds``.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        synchronize(device)
    found: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        microseconds = event.device_time if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found.setdefault(event.name[:_NAME], []).append(microseconds / 1e6)
    longest = sorted(found.items(), key=lambda named: -sum(named[1]))[:_MOST]
    return {
        "count": sum(map(len, found.values())),
        "seconds": sum(map(sum, found.values())),
        "longest": [{"name": name, "count": len(each), "seconds": sum(each)} for name, each in longest],
    }
