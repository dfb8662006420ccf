"""Measure dense attention and FASA: one attention call (op), or a whole decode step, over contexts and batches.

All rivals of one context and batch run interleaved in one process. Weights, queries and keys are random, so times say
nothing about quality: n_tip and n_fac are what evals/results measures quality at. Writes JSON after every row (a run
that was stopped goes on where it was), and a table and a picture at the end.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from fasa_flex.bench import op, rivals, step
from fasa_flex.bench.record import Ledger, command_line, provenance, reason_of
from fasa_flex.bench.report import absences, crossovers, picture, sentences, table
from fasa_flex.bench.settings import BACKENDS, DTYPES, MODES, Settings, quick
from fasa_flex.bench.shapes import SHAPES
from fasa_flex.bench.timing import bandwidth, free_memory
from fasa_flex.config import Completion, FasaConfig, GroupReduce
from fasa_flex.packing import PackedDtype
from fasa_flex.saving import replacing

Key = dict[str, Any]  # shape, batch and context
Measure = Callable[[], dict[str, Any]]

PARTS = ("op", "step")
_CONTEXTS = {
    ("op", "cpu"): (1024, 4096, 16384, 65536),
    ("step", "cpu"): (1024, 4096, 32768),
    ("op", "cuda"): (1024, 4096, 16384, 32768, 65536, 131072),
    ("step", "cuda"): (4096, 16384, 32768, 65536, 131072),
}
_QUALITY = "random weights: for quality at n_tip and n_fac see demo.json and choices.json in evals/results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fasa-flex bench``."""
    parser.add_argument("--part", choices=[*PARTS, "all"], default="op", help="what to measure (default: op)")
    parser.add_argument("--shapes", type=_words, help=f"of {', '.join(SHAPES)} (default: llama-3.1-8b)")
    parser.add_argument("--contexts", type=_numbers, help="tokens, such as 4096,32k (default: 1k to 64k on CPU)")
    parser.add_argument("--batches", type=_numbers, help="rows (default: 1,8; for a step on CPU 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), help="(default: float32 on CPU, bfloat16 on CUDA)")
    parser.add_argument(
        "--packed-dtype",
        choices=[*get_args(PackedDtype), "cache"],
        default=Settings.packed_dtype,
        help="of packed keys, or the cache's (default: int4)",
    )
    parser.add_argument("--completion", choices=get_args(Completion), default=Settings.completion)
    parser.add_argument("--n-tip", type=int, help="dominant chunks (default: half of them)")
    parser.add_argument("--n-fac", type=int, default=256, help="tokens a query attends to (default: 256)")
    parser.add_argument("--group-reduce", choices=get_args(GroupReduce), default=FasaConfig().group_reduce)
    parser.add_argument("--modes", type=_words, default=MODES, help="eager, compiled or both (default: both)")
    parser.add_argument(
        "--backends",
        type=_words,
        default=BACKENDS,
        help="of FASA: permuted, and by default gather,flex,triton",
    )
    parser.add_argument("--layers", type=int, help="of the model in a step (default: as many as fit)")
    parser.add_argument("--dense-layers", type=_layers, help="in a step, or none (default: 0 in a whole model)")
    parser.add_argument("--static-lengths", action="store_true", help="compile every context for itself (op)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of a row at most (default: 15)")
    parser.add_argument("--row-seconds", type=float, default=10.0, help="time for a row's rounds (default: 10)")
    parser.add_argument("--seconds", type=float, help="begin no row of a part after so long")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and two contexts, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again what the output has already")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results (default: runs)")


def run(options: argparse.Namespace) -> None:
    """Measure what ``options`` ask for.

    Raises:
        ValueError: options that cannot be, or a part without a single row.
    """
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {options.device!r}.") from None
    for part in PARTS if options.part == "all" else (options.part,):
        settings = _settings(options, part, device)
        if not _measure_part(part, settings, options):
            raise ValueError(f"part {part} has not a single row; the reasons are above.")


def _settings(options: argparse.Namespace, part: str, device: torch.device) -> Settings:
    kind = "cuda" if device.type == "cuda" else "cpu"
    settings = Settings(
        device=device,
        dtype=DTYPES[options.dtype or ("float32" if kind == "cpu" else "bfloat16")],
        shapes=options.shapes or ("llama-3.1-8b",),
        contexts=options.contexts or _CONTEXTS[part, kind],
        batches=options.batches or ((1,) if (part, kind) == ("step", "cpu") else (1, 8)),
        n_tip=options.n_tip,
        n_fac=options.n_fac,
        group_reduce=options.group_reduce,
        packed_dtype=None if options.packed_dtype == "cache" else options.packed_dtype,
        completion=options.completion,
        modes=options.modes,
        backends=options.backends,
        repeats=options.repeats,
        seconds=options.row_seconds,
        layers=options.layers,
        dense_layers=options.dense_layers,
        static_lengths=options.static_lengths,
    )
    return quick(settings) if options.quick else settings


def _measure_part(part: str, settings: Settings, options: argparse.Namespace) -> list[dict[str, Any]]:
    device, begun = settings.device, time.monotonic()
    path = options.out / f"bench_{part}_{device.type}.json"
    origin = provenance(command_line("fasa_flex.bench"), device)
    head = {"part": part, **origin, "settings": settings.to_dict(), "quality": _QUALITY}
    ledger = Ledger(path, head, options.fresh)
    ledger.data["bandwidth_gb_per_s"] = bandwidth(device)
    for key, measure in {"op": _op_rows, "step": _step_rows}[part](settings, ledger):
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
            print(f"[{time.monotonic() - begun:.0f} s] {_told(row)}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _report(ledger, part)
    return ledger.rows


def _op_rows(settings: Settings, ledger: Ledger) -> Iterator[tuple[Key, Measure | str]]:
    for name in settings.shapes:
        shape = SHAPES[name]
        for batch in settings.batches:
            torch._dynamo.reset()  # compiled for one shape and batch; among its contexts only lengths differ
            dense, sparse = rivals.dense_rivals(settings), rivals.sparse_rivals(settings)
            for context in settings.contexts:
                key = {"shape": name, "batch": batch, "context": context}
                if ledger.has(key):
                    continue
                needed, free = 2 * op.bytes_needed(shape, batch, context, settings), free_memory(settings.device)
                if needed > free:
                    yield key, f"needs about {needed >> 20} MiB, {free >> 20} are free"
                else:
                    yield key, partial(op.measure, shape, batch, context, settings, dense, sparse)


def _step_rows(settings: Settings, ledger: Ledger) -> Iterator[tuple[Key, Measure | str]]:
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


def _told(row: dict[str, Any]) -> str:
    """A row in a line: the best dense time, and every sparse one against it."""
    times = {rival["name"]: rival["seconds"] for rival in row["rivals"]}
    sparse = [f"{r['name']} {r['speedup']:.2f}x" for r in row["rivals"] if r["kind"] == "sparse"]
    where = f"{row['shape']}, batch {row['batch']}, {row['context']} tokens"
    return f"{where}: {row['best_dense']} {1e3 * times[row['best_dense']]:.3g} ms; " + ", ".join(sparse)


def _report(ledger: Ledger, part: str) -> None:
    """Crossovers and the table into the file, the picture beside it, and all of it in words."""
    rows = ledger.rows
    if rows:
        ledger.data["crossovers"] = crossovers(rows)
        ledger.data["table"] = table(rows)
        ledger.write()
        print(f"\n{ledger.data['table']}\n\n{sentences(ledger.data['crossovers'])}")
        print(absences(rows))
        _draw(ledger, part)
    for left in ledger.data["left_out"]:
        print(f"left out: {left['shape']}, batch {left['batch']}, {left['context']} tokens: {left['reason']}")
    print(f"written to {ledger.path}")


def _draw(ledger: Ledger, part: str) -> None:
    hardware = ledger.data["hardware"]
    where = hardware.get("gpu", f"{hardware['cpu']}, {hardware['threads']} threads")
    what = {"op": "One attention call", "step": "A whole decode step"}[part]
    title = f"{what} on {where}, {ledger.data['settings']['dtype']}"
    try:
        drawn = picture(ledger.rows, title)
    except ImportError:
        print("no picture: it needs matplotlib (pip install fasa-flex[plots])")
        return
    with replacing(ledger.path.parent) as beside:
        drawn.savefig(beside / ledger.path.with_suffix(".png").name, dpi=150)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.lower().split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word[:-1]) * 1024 if word.endswith("k") else int(word) for word in _words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 4096,32k, got {text!r}") from None


def _layers(text: str) -> tuple[int, ...]:
    return () if text == "none" else _numbers(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fasa_flex.bench``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fasa-flex bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        print(f"fasa-flex bench: {error}", file=sys.stderr)
        return 2
    return 0
