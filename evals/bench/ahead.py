"""Estimates the gain of two ideas for FASA-M that are not implemented: prefetching host rows, and narrower rows.

    python -m evals.bench.ahead --out runs               # on CUDA, with 20 GB of host memory

Measures a decode step of eight layers of Llama-3.1-8B's shape as a CUDA graph, with the fetch of the selected rows
after the query's product (kernels of `fasa_flex.backends.triton.decode`). The step fetches either all new rows in line,
or the best 512 or 1024 rows of the last step ahead, on a side stream during the rest of the layer, and the missing ones
in line. The shares of new rows come from the reference model (evals/results/study/agreement.json, part "renewal").
Prefetching would need a second selection, which is not counted, in its favour.

Narrower rows lack a key's packed dimensions, which the device has, and are an eighth shorter. Joining the two parts of
a key is not counted, in their favour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasa_flex.backends.triton import decode
from fasa_flex.bench.record import RowLedger, command_line, provenance
from fasa_flex.bench.shapes import SHAPES
from fasa_flex.bench.timing import graphed, interleave
from fasa_flex.caches.pinned_memory import host_rows, split_rows
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.resident_rows import ResidentRows

SHAPE = SHAPES["llama-3.1-8b"]
LAYERS = 8
SELECTED = 256
NEW = 0.48
"""Share of new rows among 256 selected ones from step to step; assumed to be the same for 512 and 1024."""

MISSING = {512: 0.30, 1024: 0.16}
"""Share of 256 selected rows that are not among the best 512 or 1024 of the last step."""

UNPACKED = SHAPE.head_dim - 2 * FasaConfig().chunks_of(SHAPE.head_dim)
"""Number of a key's dimensions that are not packed."""


@dataclass(frozen=True)
class Layer:
    """One layer: weights [in, out], keys and values in host memory, the device's rows of these, and slots to fetch."""

    weights: tuple[Tensor, ...]
    key: Tensor
    value: Tensor
    resident: dict[int, ResidentRows]
    slots: dict[int, Tensor]

    @classmethod
    def random(cls, batch: int, context: int) -> Layer:
        """A layer of random numbers, with slots scattered over the context."""
        hidden, inner = SHAPE.hidden, SHAPE.intermediate
        joint = (SHAPE.query_heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim
        sizes = ((hidden, joint), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
        weights = tuple(torch.randn(size, device="cuda", dtype=torch.bfloat16) * size[0] ** -0.5 for size in sizes)
        counts = (SELECTED, *MISSING)
        slots = {count: _scattered(batch * SHAPE.kv_heads, context, count) for count in counts}
        return cls(weights, *_rows(batch, context, SHAPE.head_dim), slots)

    def narrower(self) -> Layer:
        """The layer with keys of the unpacked dimensions only."""
        key, value, held = _rows(self.key.shape[0], self.key.shape[2], UNPACKED)
        return replace(self, key=key, value=value, resident=held)

    def fetch(self, count: int, share: float, programs: int) -> None:
        """Fetch ``share`` of ``count`` rows for each key/value head."""
        held = self.resident[count]
        held.forget(share)
        decode.FETCH_PROGRAMS = programs
        rows = (held.slots, held.places, held.keys, held.values)
        decode.hold_slots(self.key, self.value, self.slots[count], *rows, None)


def _rows(batch: int, context: int, key_dim: int) -> tuple[Tensor, Tensor, dict[int, ResidentRows]]:
    """Keys and values in host memory, and empty `ResidentRows` for them on the device."""
    like = torch.empty(batch, SHAPE.kv_heads, 0, SHAPE.head_dim, device="cuda", dtype=torch.bfloat16)
    states = (like[..., :key_dim], like)
    key, value = split_rows(host_rows(*states, context, like.device), key_dim)
    return key, value, {count: ResidentRows.empty(*states, count) for count in (SELECTED, *MISSING)}


def _scattered(rows: int, context: int, count: int) -> Tensor:
    drawn = (torch.randperm(context, device="cuda")[:count] for _ in range(rows))
    return torch.stack([slots.sort().values for slots in drawn]).int()


def step(layers: list[Layer], batch: int, in_line: float, ahead: tuple[int, int] | None) -> Callable[[], Tensor]:
    """A decode step that fetches the share ``in_line`` of its rows in line, and ``ahead`` = (rows, programs) ahead."""
    side: Any = torch.cuda.Stream()
    begun = torch.ones(batch, SHAPE.hidden, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        x, main = begun, torch.cuda.current_stream()
        for layer in layers:
            query, out, up, down = layer.weights
            x = (x @ query)[:, : SHAPE.hidden]
            if in_line:
                layer.fetch(SELECTED, in_line, 64)
            if ahead is not None:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    layer.fetch(ahead[0], NEW, ahead[1])
            x = (((x @ out) @ up)[:, : SHAPE.intermediate]) @ down
            if ahead is not None:
                main.wait_stream(side)
        return x

    return run


@torch.no_grad()
def measure(batch: int, context: int, seconds: float) -> list[dict[str, Any]]:
    """Microseconds of a layer for every way of fetching."""
    layers = [Layer.random(batch, context) for _ in range(LAYERS)]
    narrow = [layer.narrower() for layer in layers]
    ways: list[dict[str, Any]] = [
        {"fetched": "nothing", "in_line": 0.0},
        {"fetched": "in line", "in_line": NEW},
        {"fetched": "in line, without the packed dimensions", "in_line": NEW, "key_dim": UNPACKED},
    ]
    for count, missing in MISSING.items():
        for programs in (16, 32, 64, 128):
            ways.append({"fetched": f"{count} rows ahead", "in_line": missing, "ahead": (count, programs)})
    calls = {}
    for number, way in enumerate(ways):
        chosen = narrow if "key_dim" in way else layers
        call, how = graphed(step(chosen, batch, way["in_line"], way.get("ahead")), torch.device("cuda"))
        if how != "graph":
            raise RuntimeError(f"{way} was not captured as a graph: {how}.")
        calls[str(number)] = call
    times = interleave(calls, torch.device("cuda"), 15, seconds)
    rows = []
    for way, timing in zip(ways, times.values(), strict=True):
        quartiles = [quartile / LAYERS * 1e6 for quartile in timing.quartiles()]
        found = {"batch": batch, "context": context, **way, "microseconds": timing.median / LAYERS * 1e6}
        rows.append({**found, "quartiles": quartiles, "rounds": len(timing.seconds)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for ahead_cuda.json (default: runs)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("it needs a CUDA device.", file=sys.stderr)
        return 1
    head = provenance(command_line("evals.bench.ahead"), torch.device("cuda"))
    ledger = RowLedger(options.out / "ahead_cuda.json", {**head, "settings": {"layers": LAYERS, "new": NEW}})
    for batch, context in ((1, 131072), (8, 32768)):
        if ledger.has({"batch": batch, "context": context}):
            continue
        for row in measure(batch, context, 2.0):
            ledger.add(row)
            print(
                f"batch {batch}: {row['fetched']} {row.get('ahead', '')} {row['microseconds']:.1f} microseconds a layer"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
