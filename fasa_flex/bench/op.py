"""Part ``op``: one attention call of a decode step, for every available form of dense attention and for FASA.

Keys and values are buffers of exactly the context's length, so no time is spent on growing. If they would fit in the
processor's cache, a call runs over several copies, as a model runs over its layers, since a real decode step finds no
keys in that cache. Keys are random, so selected rows are scattered over the whole context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasa_flex.bench.launches import launches_of
from fasa_flex.bench.limits import Reads, attention_reads
from fasa_flex.bench.record import reason_of
from fasa_flex.bench.rivals import Call, Inputs
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import Shape
from fasa_flex.bench.stages import stage_seconds
from fasa_flex.bench.timing import Timing, free_memory, graphed, interleave, last_level_cache, peak_of

_MOST_COPIES = 64
_MOST_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
_LEAST_CALLS = {"cpu": 1, "cuda": 16}  # calls in one graph, which share its launch as a model's layers do
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error between rivals of one kind; a rival with a larger one is left out."""


def reads_of(x: Inputs, shape: Shape, settings: Settings) -> Reads:
    """Bytes that one call must read, counted on its tensors."""
    batch, heads, context, dim = x.k.shape
    token = x.packed.n_bytes / (batch * heads * context)
    n_tip = settings.chunks_of(shape)
    state = 0 if x.state is None else x.state.mean_value.nbytes + x.state.covariance.nbytes
    return attention_reads(context, batch, heads, dim, n_tip, settings.n_fac, x.k.element_size(), token, state)


def bytes_needed(shape: Shape, batch: int, context: int, settings: Settings) -> int:
    """Bytes of keys, values and packed keys, and of the scores and copies that calls make."""
    item = settings.dtype.itemsize
    token = shape.kv_heads * 2 * (shape.head_dim + 2 * settings.chunks_of(shape)) * item + shape.query_heads * 24
    return batch * context * token


@torch.no_grad()
def measure(
    shape: Shape,
    batch: int,
    context: int,
    settings: Settings,
    dense: Mapping[str, Call],
    sparse: Mapping[str, Call | str],
) -> dict[str, Any]:
    """Measure one row: all rivals at one context and batch.

    Args:
        shape: shape of the model.
        batch: rows.
        context: keys of a row.
        settings: settings of the run.
        dense: result of `dense_rivals`; reuse it for the rows of one batch, so that rivals compile once.
        sparse: result of `sparse_rivals`, reused likewise.
    """
    device = settings.device
    first = Inputs.random(shape, batch, context, settings)
    reads = reads_of(first, shape, settings)
    wanted = math.ceil(2 * last_level_cache(device) / reads.sparse)
    budget = min(_MOST_BYTES[device.type], free_memory(device) // 4)
    copies = max(1, min(wanted, _MOST_COPIES, budget // first.nbytes))
    layers = [first, *(first.clone() for _ in range(copies - 1))]
    laps = math.ceil(_LEAST_CALLS[device.type] / copies)
    rivals, errors, left_out = _warmed({**dense, **sparse}, set(dense), first)

    def over_layers(call: Call) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(laps):
                for x in layers:
                    call(x)

        return run

    timed = {name: graphed(over_layers(call), device) for name, call in rivals.items()}
    rounds = interleave({name: call for name, (call, _) in timed.items()}, device, settings.repeats, settings.seconds)
    times = {name: Timing(tuple(t / (laps * copies) for t in timing.seconds)) for name, timing in rounds.items()}
    best = min((name for name in times if name in dense), key=lambda name: times[name].median)
    measured = sparse and "gather" in settings.backends and device.type == "cpu"  # elsewhere kernels have names
    stages = stage_seconds(layers, settings) if measured else {}
    row: dict[str, Any] = {
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "n_tip": settings.chunks_of(shape),
        "n_fac": settings.n_fac,
        "copies": copies,
        "cold": copies == wanted or wanted <= 1,
        "reads": {"dense": reads.dense, "sparse": reads.sparse},
        "limit": reads.limit,
        "best_dense": best,
        "left_out": left_out,
        "stages": {name: {"seconds": each, "share": each / sum(stages.values())} for name, each in stages.items()},
        "rivals": [],
    }
    for name, timing in times.items():
        kind = "dense" if name in dense else "sparse"
        entry = describe(name, kind, timing, times[best], getattr(reads, kind))
        if kind == "sparse":
            entry["limit_share"] = entry["speedup"] / reads.limit
        peak = peak_of(partial(rivals[name], first), device)
        if device.type == "cuda":
            entry["launches"] = launches_of(partial(rivals[name], first), device)
        buffers = first.nbytes - (first.packed.n_bytes if kind == "dense" else 0)
        entry |= {
            "timed": timed[name][1],
            "error": errors[name],
            "memory": {"buffers": buffers, "beyond": peak.bytes, "how": peak.how, "peak": buffers + (peak.bytes or 0)},
        }
        row["rivals"].append(entry)
    return row


def _warmed(
    rivals: Mapping[str, Call | str], dense: set[str], x: Inputs
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """The rivals that run and agree with the first of their kind, their errors, and the reasons against the others."""
    good: dict[str, Call] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    first: dict[bool, Tensor] = {}
    for name, call in rivals.items():
        if isinstance(call, str):
            left_out[name] = call
            continue
        try:
            out = call(x).float()
        except Exception as error:  # a failing rival must not stop the others
            left_out[name] = reason_of(error)
            continue
        expected = first.setdefault(name in dense, out)
        wrong = float((out - expected).norm() / expected.norm())
        if wrong <= TOLERANCE[x.q.dtype]:
            good[name], errors[name] = call, wrong
        else:
            left_out[name] = f"differs from {next(iter(good), 'itself')} by {wrong:.2g} of its norm"
    if not dense & set(good):
        raise RuntimeError(f"no dense attention runs here: {left_out}.")
    return good, errors, left_out


def describe(name: str, kind: str, timing: Timing, best: Timing, read: int) -> dict[str, Any]:
    """The fields of a rival's entry about its time."""
    first, third = timing.quartiles()
    speedup, low, high = timing.ratio(best)
    return {
        "name": name,
        "kind": kind,
        "seconds": timing.median,
        "quartiles": [first, third],
        "rounds": len(timing.seconds),
        "gb_per_s": read / timing.median / 1e9,
        "speedup": speedup,
        "speedup_quartiles": [low, high],
    }
