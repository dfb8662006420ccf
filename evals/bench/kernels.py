"""Times the kernels of a decode call one by one, with other sizes of their programs, beside dense attention.

    python -m evals.bench.kernels --out runs                                        # on CUDA, the sizes in use
    python -m evals.bench.kernels --out runs --set SCORE_BLOCK=128 --set SCORE_WARPS=8,SCORE_STAGES=3
    TRITON_INTERPRET=1 python -m evals.bench.kernels --out runs --contexts 512      # on CPU: a dry run

A variant sets constants of `fasa_flex.backends.triton.tip`, `.attention` and `.decode`. All variants of a batch and
context take turns, as CUDA graphs over several layers, so that keys are cold. Each is first compiled in processes of
its own. A row has the whole call and its parts:

    sums         `sum_keys`, the mass of the sampled keys
    scores       `score_keys`, with the bytes of packed keys that it reads a second
    list         `list_keys`, the keys that may be selected
    attention    `attend_rows` with the selection in it
    merge        `merge_parts`, with the completion
    attended     `attend_rows` and `merge_parts` of selected rows

A part alone includes the launch that programmatic dependent launch hides in a call, so that parts may add up to more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.backends.triton import attention, decode, dispatch, tip
from fasa_flex.bench.record import RowLedger, command_line, provenance, reason_of
from fasa_flex.bench.shapes import SHAPES, random_chunks
from fasa_flex.bench.timing import graphed, interleave, last_level_cache
from fasa_flex.core.completion import Completion, CompletionState
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import Marks, valid_keys
from fasa_flex.core.softmax import Softmax

SHAPE = SHAPES["llama-3.1-8b"]
MODULES = (tip, attention, decode)
"""Modules whose constants a variant sets."""

CALLS = 8
"""Calls in one graph, at the least."""

Variant = tuple[tuple[str, int], ...]


class Skipped:
    """A kernel that is not launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def layer(batch: int, context: int, device: torch.device, config: FasaConfig, seed: int = 0) -> Call:
    """A decode call of normally distributed numbers, with the defaults of `FasaConfig` and no earlier dense layer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, SHAPE.head_dim, generator=generator, device=device, dtype=dtype)

    k, v, q = draw(SHAPE.kv_heads, context), draw(SHAPE.kv_heads, context), draw(SHAPE.query_heads, 1)
    chunks = random_chunks(SHAPE, config.chunks_of(SHAPE.head_dim), device)
    scorer, valid = DominantChunks(chunks.flatten(1), dtype=config.packed_dtype), valid_keys(1, context, None, device)
    packed = PackedKeys.of(scorer.pack(k), config.packed_dtype)
    state, everyone = CompletionState.empty(k, v, True), valid[0, 0, 0]
    state.advance(k, v, everyone, everyone.cumsum(-1), context)
    marks, softmax = Marks.of(valid, config.budget, samples=True), Softmax(SHAPE.head_dim**-0.5)
    call = Call(q, k, v, scorer, valid, config.budget, config.group_reduce, softmax, packed, None, marks)
    call.completion = Completion(config.completion_strength, state)
    return call


@contextmanager
def changed(variant: Variant, **others: object) -> Iterator[None]:
    """Set the constants of a variant, and ``others``, in the modules that have them."""
    with ExitStack() as stack:
        for name, value in (*variant, *others.items()):
            for module in MODULES:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def parts_of(calls: Sequence[Call]) -> dict[str, tuple[Callable[[int], object], dict[str, object]]]:
    """Each part's function of the number of a layer, and what it replaces."""
    tips = []
    for call in calls:
        query, fields, ending = dispatch._arguments_of(call)
        tips.append((query, tip.Tip(*fields), attention.Ending(*ending)))
    rankings = [tip.ranked(query, each) for query, each, _ in tips]
    lists = [tip.listed(ranking, each) for ranking, (_, each, _) in zip(rankings, tips, strict=True)]
    chosen = [decode.select_slots(query, *each)[0] for query, each, _ in tips]
    written = {id(each): (ranked.units, ranked.masses) for (_, each, _), ranked in zip(tips, rankings, strict=True)}

    def rank(number: int) -> object:
        return tip.ranked(*tips[number][:2])

    def attend(number: int, places: Tensor | None) -> object:
        (query, each, ending), call, ranked = tips[number], calls[number], rankings[number]
        found = lists[number] if places is None else lists[number]._replace(slots=places)
        states = (query, call.key, call.value, places, found, ranked.units, ranked.masses)
        return attention.attended(*states, each, ending)

    return {
        "call": (lambda number: dispatch.decode_by_kernels(calls[number]), {}),
        "sums": (rank, {"score_keys": Skipped()}),
        "scores": (rank, {"sum_keys": Skipped(), "unit_and_mass": lambda query, each: written[id(each)]}),
        "list": (lambda number: tip.listed(rankings[number], tips[number][1]), {}),
        "attention": (lambda number: attend(number, None), {"merge_parts": Skipped()}),
        "merge": (lambda number: attend(number, None), {"attend_rows": Skipped()}),
        "attended": (lambda number: attend(number, chosen[number]), {}),
    }


@torch.no_grad()
def compiled(variant: Variant, batch: int, context: int, device: str) -> str | None:
    """Compile the kernels of a variant; return why that failed."""
    try:
        with changed(variant):
            parts = parts_of([layer(batch, context, torch.device(device), FasaConfig())])
            for run, others in parts.values():
                with changed((), **others):
                    run(0)
    except Exception as error:
        return f"{dict(variant)} at {batch} x {context}: {reason_of(error)}"
    return None


@torch.no_grad()
def measure(batch: int, context: int, variants: list[Variant], device: torch.device) -> list[dict[str, Any]]:
    """Microseconds of a call and of its parts, for every variant."""
    config = FasaConfig()
    first = layer(batch, context, device, config)
    assert isinstance(first.packed_keys, PackedKeys)
    copies = 1
    if device.type == "cuda":
        copies = max(2, min(16, math.ceil(3 * last_level_cache(device) / first.packed_keys.n_bytes)))
    calls = [first, *(layer(batch, context, device, config, seed) for seed in range(1, copies))]
    laps = math.ceil(CALLS / copies) if device.type == "cuda" else 1

    def over(run: Callable[[int], object]) -> Callable[[], Any]:
        def every() -> None:
            for _ in range(laps):
                for number in range(copies):
                    run(number)

        return graphed(every, device)[0]

    def dense(number: int) -> Tensor:
        call = calls[number]
        return F.scaled_dot_product_attention(call.query, call.key, call.value, enable_gqa=True)

    timed: dict[str, Callable[[], Any]] = {"dense": over(dense)}
    for at, variant in enumerate(variants):
        with changed(variant):
            for name, (run, others) in parts_of(calls).items():
                with changed((), **others):  # a graph keeps what it captured; without one each call needs it
                    timed[f"{at} {name}"] = over(run) if device.type == "cuda" else partial(run, 0)
    times = interleave(timed, device, 11, 4.0)
    micro = {name: timing.median / (laps * copies) * 1e6 for name, timing in times.items()}
    rows = []
    for at, variant in enumerate(variants):
        own = {name.partition(" ")[2]: value for name, value in micro.items() if name.startswith(f"{at} ")}
        rate = first.packed_keys.n_bytes / own["scores"] / 1e3
        sizes = {"batch": batch, "context": context, "variant": dict(variant), "copies": copies}
        speedup = micro["dense"] / own["call"]
        rows.append({**sizes, "dense": micro["dense"], **own, "speedup": speedup, "packed_gb_per_s": rate})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for kernels_<device>.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default="1,8", help="batch rows (default: 1,8)")
    parser.add_argument("--contexts", default="32768,131072", help="tokens of a row (default: 32768,131072)")
    parser.add_argument("--set", action="append", default=[], help="a variant: NAME=NUMBER,NAME=NUMBER...")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0: none (default: 8)")
    options = parser.parse_args()
    device = torch.device(options.device)
    variants: list[Variant] = [()]
    for text in options.set:
        pairs = [pair.partition("=") for pair in text.split(",")]
        for name, _, value in pairs:
            if not value.isdecimal() or not any(hasattr(module, name) for module in MODULES):
                parser.error(f"--set {text}: {name}={value} sets no constant to a number; pass NAME=NUMBER.")
        variants.append(tuple((name, int(value)) for name, _, value in pairs))
    sizes = list(product(*(map(int, text.split(",")) for text in (options.batches, options.contexts))))
    head = {**provenance(command_line("evals.bench.kernels"), device), "settings": {"shape": SHAPE.name}}
    ledger = RowLedger(options.out / f"kernels_{device.type}.json", head, fresh=True)
    with mock.patch("fasa_flex.core.packed_keys.tile_of", return_value=1):  # as on a GPU
        if device.type == "cuda" and options.workers:
            with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
                every = [(variant, *size, options.device) for variant in variants for size in sizes]
                for reason in pool.map(compiled, *zip(*every, strict=True)):
                    if reason:
                        print(reason, flush=True)
        for batch, context in sizes:
            for row in measure(batch, context, variants, device):
                ledger.add(row)
                numbers = {name: round(value, 1) for name, value in row.items() if isinstance(value, float)}
                print(f"{batch} x {context} {row['variant']}: {numbers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
