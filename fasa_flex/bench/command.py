"""``fasa-flex bench``: time an attention call (op), a decode step (step), a prefill, or many requests (serve).

All rivals of one context and batch run interleaved in one process. Weights, queries and keys are random, so a run
measures no quality; evals/results has the quality at the default n_tip and n_fac. The command writes JSON after every
row, so that a stopped run can be continued, and a table and a picture at the end.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fasa_flex.bench import op, prefill, rivals, serve, step
from fasa_flex.bench.options import BACKENDS, PARTS
from fasa_flex.bench.record import RowLedger, command_line, provenance, reason_of
from fasa_flex.bench.report import absences, crossovers, picture, sentences, table
from fasa_flex.bench.settings import Settings, quick
from fasa_flex.bench.shapes import SHAPES
from fasa_flex.bench.timing import bandwidth, free_memory
from fasa_flex.core.config import FasaConfig
from fasa_flex.errors import StateError
from fasa_flex.saving import replacing

Key = dict[str, Any]  # shape, batch and context
Measure = Callable[[], dict[str, Any]]

_CONTEXTS = {
    ("op", "cpu"): (1024, 4096, 16384, 65536),
    ("step", "cpu"): (1024, 4096, 32768),
    ("prefill", "cpu"): (1024, 4096),
    ("prefill", "cuda"): (131072, 65536, 32768, 16384, 8192),
    ("op", "cuda"): (1024, 4096, 16384, 32768, 65536, 131072),
    ("step", "cuda"): (4096, 16384, 32768, 65536, 131072),
    ("serve", "cpu"): (1024,),
    ("serve", "cuda"): (2048, 8192, 32768),
}
_BATCHES = {
    ("step", "cpu"): (1,),
    ("prefill", "cpu"): (1,),
    ("prefill", "cuda"): (1,),
    ("serve", "cpu"): (4,),
    ("serve", "cuda"): (16,),
}
"""Default batches, for serve numbers of requests, where they are not 1 and 8."""
_QUALITY = "random weights: for quality at n_tip and n_fac see choices.json in evals/results"


def run(options: argparse.Namespace) -> None:
    """Run the benchmark.

    Raises:
        ValueError: options out of range.
        RuntimeError: a part in which no row, or no sparse rival, could be measured.
    """
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {options.device!r}.") from None
    for part in PARTS if options.part == "all" else (options.part,):
        settings = _settings(options, part, device)
        rows = _measure_part(part, settings, options)
        if not rows:
            raise StateError(f"part {part} has no row; the reasons are above.")
        if part != "serve" and not any(rival["kind"] == "sparse" for row in rows for rival in row["rivals"]):
            raise StateError(f"part {part} measured only dense attention; the reasons are above.")


def _settings(options: argparse.Namespace, part: str, device: torch.device) -> Settings:
    kind = "cuda" if device.type == "cuda" else "cpu"
    if kind == "cpu" and "triton" in (options.backends or ()):
        raise ValueError("backend triton needs CUDA, got --device cpu; name gather, flex or permuted.")
    settings = Settings(
        device=device,
        dtype=getattr(torch, options.dtype or ("float32" if kind == "cpu" else "bfloat16")),
        shapes=options.shapes or ("llama-3.1-8b",),
        contexts=options.contexts or _CONTEXTS[part, kind],
        batches=options.batches or _BATCHES.get((part, kind), (1, 8)),
        n_tip=options.n_tip,
        n_fac=options.n_fac,
        group_reduce=options.group_reduce or FasaConfig().group_reduce,
        packed_dtype=None if options.packed_dtype == "cache" else options.packed_dtype,
        completion=options.completion,
        modes=options.modes,
        backends=options.backends or BACKENDS,
        repeats=options.repeats,
        seconds=options.row_seconds,
        layers=options.layers,
        dense_layers=options.dense_layers,
        shares=options.shares or Settings.shares,
        times_model=not options.no_model,
        static_lengths=options.static_lengths,
    )
    if not options.quick:
        return settings
    return replace(quick(settings), contexts=(512, 768)) if part == "prefill" else quick(settings)


def _measure_part(part: str, settings: Settings, options: argparse.Namespace) -> list[dict[str, Any]]:
    device, begun = settings.device, time.monotonic()
    path = options.out / f"bench_{part}_{device.type}.json"
    origin = provenance(command_line("fasa_flex.bench"), device)
    head = {"part": part, **origin, "settings": settings.to_dict(), "quality": _QUALITY}
    ledger = RowLedger(path, head, options.fresh)
    ledger.data["bandwidth_gb_per_s"] = bandwidth(device)
    try:
        for key, measure in _rows_of(part, options)(settings, ledger):
            if isinstance(measure, str):
                ledger.leave_out(key, measure)
                continue
            if options.seconds is not None and time.monotonic() - begun > options.seconds:
                ledger.leave_out(key, f"no time left of {options.seconds:.0f} s")
                continue
            try:
                row = measure()
            except (RuntimeError, ValueError) as error:  # torch's out-of-memory errors are RuntimeErrors
                ledger.leave_out(key, reason_of(error))
            else:
                ledger.add(row)
                described = serve.line(row) if part == "serve" else _line(row)
                print(f"[{time.monotonic() - begun:.0f} s] {described}", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        finished = f"{len(ledger.rows)} finished rows are in {ledger.path}; the same command continues after them."
        print(f"stopped: {finished}", file=sys.stderr)
        raise
    _report(ledger, part)
    return ledger.rows


def _rows_of(
    part: str, options: argparse.Namespace
) -> Callable[[Settings, RowLedger], Iterator[tuple[Key, Measure | str]]]:
    if part == "serve":
        return partial(_serve_rows, new_tokens=options.new_tokens)
    return {"op": _op_rows, "step": _step_rows, "prefill": _prefill_rows}[part]


def _op_rows(settings: Settings, ledger: RowLedger) -> Iterator[tuple[Key, Measure | str]]:
    for name in settings.shapes:
        shape = SHAPES[name]
        for batch in settings.batches:
            torch._dynamo.reset()  # so that compiled code is specific to a shape and batch, with dynamic lengths only
            dense, sparse = rivals.dense_rivals(settings), rivals.sparse_rivals(settings)
            for context in settings.contexts:
                key = {"shape": name, "batch": batch, "context": context}
                if ledger.has(key):
                    continue
                needed, free = 2 * op.bytes_needed(shape, batch, context, settings), free_memory(settings.device)
                if needed > free:
                    yield key, f"needs about {needed >> 20} MiB, but {free >> 20} MiB are free"
                else:
                    yield key, partial(op.measure, shape, batch, context, settings, dense, sparse)


def _step_rows(settings: Settings, ledger: RowLedger) -> Iterator[tuple[Key, Measure | str]]:
    for name in settings.shapes:
        shape = SHAPES[name]
        layers = step.plan(shape, settings)
        keys: list[Key] = [{"shape": name, "batch": batch, "context": context} for batch, context in layers]
        todo = [key for key in keys if not ledger.has(key)]
        depth = max((layers[key["batch"], key["context"]] for key in todo), default=0)
        model = shape.model(depth, max(settings.contexts), settings.dtype, settings.device) if depth else None
        for key in todo:
            batch, context = key["batch"], key["context"]
            fit = layers[batch, context]
            if model is None or not fit:
                yield key, "not one layer fits in memory"
            else:
                yield key, partial(step.measure, shape, batch, context, settings, model, fit)
        del model


def _serve_rows(settings: Settings, ledger: RowLedger, new_tokens: int | None) -> Iterator[tuple[Key, Measure | str]]:
    """Rows of a model that is cut to the layers which fit with the caches of all requests."""
    new_tokens = new_tokens or (16 if settings.device.type == "cpu" else 256)
    for name in settings.shapes:
        shape = SHAPES[name]
        for context in settings.contexts:
            for batch in settings.batches:
                key = {"shape": name, "batch": batch, "context": context}
                if ledger.has(key):
                    continue
                length = context + 2 * new_tokens
                layers = step.layers_that_fit(shape, batch, length, settings)
                if not layers:
                    yield key, "not one layer fits in memory"
                    continue
                model = shape.model(layers, length, settings.dtype, settings.device)
                yield key, partial(serve.measure, shape, batch, context, settings, model, layers, new_tokens)


def _prefill_rows(settings: Settings, ledger: RowLedger) -> Iterator[tuple[Key, Measure | str]]:
    for name in settings.shapes:
        shape, model = SHAPES[name], None
        sizes = [(batch, context) for batch in settings.batches for context in settings.contexts]
        todo = [size for size in sizes if not ledger.has({"shape": name, "batch": size[0], "context": size[1]})]
        depth = min((prefill.layers_that_fit(shape, *size, settings) for size in todo), default=0)
        if settings.times_model and depth:
            model = shape.model(depth, max(settings.contexts), settings.dtype, settings.device)
        for batch, context in todo:
            key: Key = {"shape": name, "batch": batch, "context": context}
            needed, free = prefill.bytes_needed(shape, batch, context, settings), free_memory(settings.device)
            if needed > free:
                yield key, f"needs about {needed >> 20} MiB, but {free >> 20} MiB are free"
            else:
                yield key, partial(prefill.measure, shape, batch, context, settings, model)
        del model


def _line(row: dict[str, Any]) -> str:
    """A row in one line: the best dense time, and each sparse rival's speed-up over it."""
    times = {rival["name"]: rival["seconds"] for rival in row["rivals"]}
    sparse = [f"{r['name']} {r['speedup']:.2f}x" for r in row["rivals"] if r["kind"] == "sparse"]
    where = f"{row['shape']}, batch {row['batch']}, {row['context']} tokens"
    said = f"{where}: {row['best_dense']} {1e3 * times[row['best_dense']]:.3g} ms; " + ", ".join(sparse)
    first = row.get("first_token", {}).get("seconds", {})
    return said + "".join(
        f"{', ' if n else '; first token '}{name} {s:.3g} s" for n, (name, s) in enumerate(first.items())
    )


def _report(ledger: RowLedger, part: str) -> None:
    """Write crossovers and the table into the file and a picture beside it, and print them."""
    rows = ledger.rows
    if rows and part == "serve":
        ledger.data["table"] = serve.table(rows)
        ledger.write()
        print(f"\n{ledger.data['table']}")
    elif rows:
        ledger.data["crossovers"] = crossovers(rows)
        ledger.data["table"] = table(rows)
        ledger.write()
        print(f"\n{ledger.data['table']}\n\n{sentences(ledger.data['crossovers'])}")
        print(absences(rows))
        _draw(ledger, part)
    for left in ledger.data["left_out"]:
        print(f"left out: {left['shape']}, batch {left['batch']}, {left['context']} tokens: {left['reason']}")
    print(f"written to {ledger.path}")


def _draw(ledger: RowLedger, part: str) -> None:
    hardware = ledger.data["hardware"]
    where = hardware.get("gpu", f"{hardware['cpu']}, {hardware['threads']} threads")
    what = {"op": "One attention call", "step": "A whole decode step", "prefill": "A prompt's attention"}[part]
    title = f"{what} on {where}, {ledger.data['settings']['dtype']}"
    try:
        drawn = picture(ledger.rows, title)
    except ImportError:
        print("no picture: it needs matplotlib (pip install fasa-flex[plots])")
        return
    with replacing(ledger.path.parent) as beside:
        drawn.savefig(beside / ledger.path.with_suffix(".png").name, dpi=150)
