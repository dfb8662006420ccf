"""The tables of speed in README.md, evals/bench/README.md and pages of evals/docs, of the committed results.

python -m evals.bench.tables            # writes them between the pages' markers
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evals.marked import fill
from fasa_flex.bench.report import side_by_side, summary

ROOT = Path(__file__).parents[2]
MAIN, DETAILS = ROOT / "README.md", Path(__file__).with_name("README.md")
METHOD, PREFILL = (ROOT / "evals" / "docs" / name for name in ("how_it_works.md", "sparse_prefill.md"))


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a committed result."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "evals" / "results" / f"{name}.json").read_text())["rows"]
    return rows


def rivals(name: str) -> str:
    """A table of FASA's rivals, with speed-ups over the best dense rival."""
    return summary(rows_of(f"bench_{name}"))


def rankings(device: str, int8: str, rival: str) -> str:
    """A table of one of FASA's rivals by group_reduce and packed_dtype."""
    files = {"softmax (default)": device, "max": f"{device}_max", int8: f"{device}_int8"}
    return side_by_side({name: rows_of(f"bench_op_{file}") for name, file in files.items()}, rival)


def growing(file: str) -> str:
    """Milliseconds of an uncompiled step on a growing cache in every variant; sparse ones are marked."""
    rows = rows_of(file)
    names = [way["name"] for way in rows[0]["ways"]]
    lines = [["context", *names], ["--:"] * (1 + len(names))]
    for row in rows:
        times = [f"{way['seconds'] * 1e3:.3g}{' (sparse)' if way['sparse'] else ''}" for way in row["ways"]]
        lines.append([f"{row['context'] // 1024}k", *times])
    return _joined(lines)


def generated(device: str) -> str:
    """Milliseconds of a token in `generate`, by cache."""
    rows = rows_of(f"generate_{device}")
    names, found = list(dict.fromkeys(row["name"] for row in rows)), dict[str, dict[str, str]]()
    for row in rows:
        found.setdefault(row["cache"], {})[row["name"]] = f"{row['seconds'] * 1e3:.3g} ms"
    lines = [["cache", *names], ["---"] + ["--:"] * len(names)]
    lines += [[cache, *(times.get(name, "-") for name in names)] for cache, times in found.items()]
    return _joined(lines)


def backends() -> str:
    """How many times as fast as the best dense attention a call of one token is by each backend, at batch 1."""
    names = {
        "FASA-C triton": "`triton`",
        "FASA-C flex, compiled": "`flex`",
        "FASA-C gather, compiled": "`compiled`",
        "FASA-C gather": "`gather`",
    }
    runs = {"H100": "bench_op_cuda", "EPYC": "bench_op_cpu_flex"}
    found = {
        (device, row["context"] // 1024, rival["name"]): f"{rival['speedup']:.2f}x"
        for device, file in runs.items()
        for row in rows_of(file)
        if row["batch"] == 1
        for rival in row["rivals"]
    }
    columns = [(device, context) for device in runs for context in (4, 16, 128)]
    lines = [["backend", *(f"{device}, {context}k tokens" for device, context in columns)]]
    lines.append(["---"] + ["--:"] * len(columns))
    lines += [[shown, *(found.get((*column, name), "-") for column in columns)] for name, shown in names.items()]
    return _joined(lines)


def kernels() -> str:
    """Microseconds of a call with the defaults, before and after the one-pass kernels, and its limit by bytes."""
    lines = [["batch", "context", "SDPA", "former kernels", "today's", "of the byte limit"], ["--:"] * 6]
    for row in rows_of("decode_kernels_cuda"):
        cells = [str(row["batch"]), f"{row['context'] // 1024}k", f"{row['dense_us']:.3g} us"]
        for us, times in (("former_kernels_us", "former_over_dense"), ("kernels_us", "over_dense")):
            cells.append(f"{row[us]:.3g} us, {row[times]:.2f}x")
        lines.append([*cells, f"{row['over_dense'] / row['limit']:.0%} of {row['limit']:.1f}x"])
    return _joined(lines)


def prefill() -> str:
    """Milliseconds of the best dense attention to a prompt, and by blocks at each share, with the estimate's part."""
    rows = sorted(rows_of("bench_prefill_cuda"), key=lambda row: int(row["context"]))
    names = [rival["name"] for rival in rows[0]["rivals"] if rival["kind"] == "sparse"]
    names.sort(key=lambda name: int(name.split()[1].rstrip("%")))
    lines = [["tokens", "best dense", *names], ["--:"] * (2 + len(names))]
    for row in rows:
        by_name = {rival["name"]: rival for rival in row["rivals"]}
        cells = [f"{row['context'] // 1024}k", f"{by_name[row['best_dense']]['seconds'] * 1e3:.3g} ms"]
        for name in names:
            rival = by_name[name]
            part = 1 - rival["stages"]["attend"] / sum(rival["stages"].values())
            cells.append(f"{rival['speedup']:.2f}x of {rival['limit']:.1f}x ({part:.0%})")
        lines.append(cells)
    return _joined(lines)


def _joined(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    MAIN: {"decode kernels": kernels},
    METHOD: {"backends": backends},
    PREFILL: {"prefill cuda": prefill},
    DETAILS: {
        "step cuda": partial(rivals, "step_cuda"),
        "generate cuda": partial(generated, "cuda"),
        "speed cuda": partial(rivals, "op_cuda"),
        "speed cpu": partial(rivals, "op_cpu"),
        "step cpu": partial(rivals, "step_cpu"),
        "rankings cuda": partial(rankings, "cuda", "max, int8 packed keys", "FASA-C triton"),
        "step compiled cuda": partial(rivals, "step_cuda_compiled"),
        "growing cuda": partial(growing, "growing_cuda"),
        "growing long cuda": partial(growing, "growing_long_cuda"),
        "growing cpu": partial(growing, "growing_cpu"),
        "rankings cpu": partial(rankings, "cpu", "softmax, int8 packed keys", "FASA-C gather, compiled"),
        "rankings cpu intel": partial(rankings, "cpu_intel", "softmax, int8 packed keys", "FASA-C gather, compiled"),
        "step cpu intel": partial(rivals, "step_cpu_intel"),
        "flex cpu": partial(rivals, "op_cpu_flex"),
        "permuted cpu": partial(rivals, "op_cpu_permuted"),
    },
}


def main() -> None:
    for page, tables in TABLES.items():
        fill(page, tables)


if __name__ == "__main__":
    main()
