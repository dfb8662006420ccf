"""Timing of rivals in interleaved rounds, CUDA graphs, memory bandwidth and peak memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasa_flex.bench.record import reason_of

LEAST_ROUNDS = 5
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_LARGEST_CACHE = 1 << 25


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Times of one rival.

    Attributes:
        seconds: seconds of one call, in the order of the rounds, so that rounds of two rivals can be paired.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        return _quartiles(self.seconds)

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """Speed-up over ``other``, round by round: median, first and third quartile."""
        ratios = [theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]
        return (statistics.median(ratios), *_quartiles(ratios))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def interleave(
    rivals: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 15,
    seconds: float = 20.0,
) -> dict[str, Timing]:
    """Time all rivals in rounds, so that a disturbance affects all of them; each round starts with another rival.

    On CUDA a call is timed by events, between synchronisations. The caller has to warm up every rival.

    Args:
        rivals: the calls by name.
        device: their device.
        repeats: most rounds.
        seconds: time after which no round starts, except for the first `LEAST_ROUNDS`.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            times[name].append(time_call(rivals[name], device))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def graphed(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], str]:
    """``call`` as the replay of a CUDA graph, so that its time contains almost no launches.

    Returns:
        the replay and "graph"; without CUDA the call and "calls"; if it cannot be captured, "calls (<reason>)".
    """
    if device.type != "cuda":
        return call, "calls"
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # time calls that cannot be captured one by one
        torch.cuda.synchronize(device)
        return call, f"calls (in capture {reason_of(error)})"
    return functools.partial(_replay, graph, call), "graph"


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], Any]) -> None:
    """Replay the graph of ``call``, which holds the tensors that the graph reads."""
    graph.replay()


def bandwidth(device: torch.device, repeats: int = 9) -> dict[str, float]:
    """The machine's memory bandwidth in GB/s: of a large copy (bytes read and written) and of a large read (a sum)."""
    size = _COPY_BYTES[device.type] // 4
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    for warm_up in calls.values():
        warm_up()
    moved = {"copy": 2 * source.nbytes, "read": source.nbytes}
    return {name: moved[name] / t.median / 1e9 for name, t in interleave(calls, device, repeats).items()}


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache, which repeated calls must not read from."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(file.read_text()) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_LARGEST_CACHE)


def _bytes(size: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    size = size.strip()
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


@dataclass(frozen=True)
class Peak:
    """Peak memory of a call.

    Attributes:
        bytes: largest number of bytes beyond those allocated before the call; None if not measurable.
        how: how it was measured.
    """

    bytes: int | None
    how: str


def peak_of(call: Callable[[], Any], device: torch.device) -> Peak:
    """Peak memory of one call beyond the memory in use; warm it up first."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated")
    resident, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        forget.write_text("5")  # resets VmHWM, the peak
        before = _status(resident, "VmRSS")
        call()
        return Peak(max(0, _status(resident, "VmHWM") - before), "growth of the resident set (VmHWM)")
    except (OSError, KeyError):
        call()
        return Peak(None, "not measurable here")


def _status(file: Path, field: str) -> int:
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields[field].split()[0]) << 10


def free_memory(device: torch.device) -> int:
    """Bytes of free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 << 30
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10
