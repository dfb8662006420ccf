"""The tables of speed in README.md, evals/bench/README.md and pages of evals/docs, of the committed results.

python -m evals.bench.tables            # writes them between the pages' markers
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evals.marked import fill
from fasa_flex.bench.report import side_by_side, summary
from fasa_flex.bench.serve import BOUND

ROOT = Path(__file__).parents[2]
MAIN, DETAILS = ROOT / "README.md", Path(__file__).with_name("README.md")
METHOD, PREFILL, SERVING, PARALLEL = (
    ROOT / "evals" / "docs" / f"{name}.md" for name in ("how_it_works", "sparse_prefill", "serving", "several_gpus")
)

FORMS = ("one program selects", "all select, first form", "all select", "integers", "larger blocks")
FORMS += ("fewer registers, again", "fewer waits")
"""Runs of kernels_cuda.json that README files compare, oldest first; the last one is today's."""

VARIANTS = {"larger blocks": {"LIST_WARPS": 4}}
"""The variant of a run with the constants that were then chosen, if it is not the first one."""


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((ROOT / "evals" / "results" / f"{name}.json").read_text())
    return found


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a committed result."""
    rows: list[dict[str, Any]] = result(name)["rows"]
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
    runs = {"H200": ("op_h200_every", "op_h200_compiled", "op_h200"), "EPYC": ("op_cpu_flex",)}  # later ones count
    contexts = {"H200": (4, 32, 128), "EPYC": (4, 16, 128)}
    found = {
        (device, row["context"] // 1024, rival["name"]): f"{rival['speedup']:.2f}x"
        for device, files in runs.items()
        for row in itertools.chain.from_iterable(rows_of(f"bench_{file}") for file in files)
        if row["batch"] == 1
        for rival in row["rivals"]
    }
    columns = [(device, context) for device in runs for context in contexts[device]]
    lines = [["backend", *(f"{device}, {context}k tokens" for device, context in columns)]]
    lines.append(["---"] + ["--:"] * len(columns))
    lines += [[shown, *(found.get((*column, name), "-") for column in columns)] for name, shown in names.items()]
    return _joined(lines)


def _calls(form: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The rows of one form of the kernels with its own constants, by batch and context."""
    variant, rows = VARIANTS.get(form, {}), result("kernels_cuda")["runs"][form]["rows"]
    found = {(row["batch"], row["context"]): row for row in rows if row["variant"] == variant}
    return {size: found[size] for size in sorted(found) if size[1] % 1024 == 0}


def kernels() -> str:
    """Microseconds of a call with the defaults, and its limit by bytes."""
    limits = {row["context"]: row["limit"] for row in rows_of("bench_op_h200")}
    lines = [["batch", "context", "SDPA", "FASA", "times as fast", "of the byte limit"], ["--:"] * 6]
    for (batch, context), row in _calls(FORMS[-1]).items():
        cells = [str(batch), f"{context // 1024}k", f"{row['dense']:.3g} us", f"{row['call']:.3g} us"]
        share = f"{row['speedup'] / limits[context]:.0%} of {limits[context]:.1f}x"
        lines.append([*cells, f"{row['speedup']:.2f}x", share])
    return _joined(lines)


def forms() -> str:
    """Microseconds of a call with the defaults by each form of the kernels, and of its parts in the largest call."""
    found = {form: _calls(form) for form in FORMS}
    sizes = list(found[FORMS[-1]])
    parts = ("sums", "scores", "list", "attention", "merge")
    head = [f"{batch} x {context // 1024}k" for batch, context in sizes]
    lines = [["kernels", *head, *(f"{part} of the last" for part in parts)]]
    lines.append(["---"] + ["--:"] * (len(sizes) + len(parts)))
    for form, rows in found.items():
        cells = [f"{rows[size]['call']:.3g}" for size in sizes]
        own = rows[sizes[-1]]
        lines.append([form, *cells, *(f"{own[part]:.3g}" if part in own else "-" for part in parts)])
    return _joined(lines)


def parallel() -> str:
    """Milliseconds of a step on one GPU and on two, dense by the fastest way and FASA."""
    found = {(row["batch"], row["context"], row["name"], row["ranks"]): row for row in rows_of("tensor_parallel_cuda")}
    lines = [["batch", "context", "dense, one GPU", "dense, two", "FASA, one", "FASA, two", "over dense, one and two"]]
    lines.append(["--:"] * len(lines[0]))
    for batch, context in dict.fromkeys(key[:2] for key in found):
        own = {key[2:]: row["seconds"] for key, row in found.items() if key[:2] == (batch, context)}
        names = {name for name, _ in own}
        dense = {n: min(own[name, n] for name in names if "FASA" not in name) for n in (1, 2)}
        fasa = {n: min(own[name, n] for name in names if "FASA" in name) for n in (1, 2)}
        cells = [str(batch), f"{context // 1024}k"]
        for seconds in (dense, fasa):
            cells += [f"{seconds[1] * 1e3:.3g} ms", f"{seconds[2] * 1e3:.3g} ms, {seconds[1] / seconds[2]:.2f}x"]
        lines.append([*cells, f"{dense[1] / fasa[1]:.2f}x, {dense[2] / fasa[2]:.2f}x"])
    return _joined(lines)


def served() -> str:
    """Requests by continuous batching: throughput and latency of every way, and the bound for dense attention."""
    lines = [["prompts up to", "way", "decoded tokens/s", "first token (p95)", "a token (p95)", "memory"]]
    lines.append(["--:", "---"] + ["--:"] * 4)
    rows = sorted(rows_of("bench_serve_cuda"), key=lambda row: int(row["context"]))
    for row in rows:
        for way in row["rivals"]:
            first, token = way["first_token_s"], way["token_s"]
            cells = [f"{row['context'] // 1024}k", way["name"], f"{way['decode_tokens_per_s']:.0f}"]
            cells.append(f"{first['median']:.3g} s ({first['p95']:.3g})")
            cells.append(f"{token['median'] * 1e3:.3g} ms ({token['p95'] * 1e3:.3g})")
            lines.append([*cells, f"{way['peak_bytes'] / 1e9:.3g} GB"])
    for context, bound in {row["context"]: row["dense_bound_tokens_per_s"] for row in rows}.items():
        lines.append([f"{context // 1024}k", BOUND, f"{bound:.0f}", "-", "-", "-"])
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
    SERVING: {"serve cuda": served},
    PARALLEL: {"parallel cuda": parallel},
    DETAILS: {
        "forms cuda": forms,
        "speed h200": partial(rivals, "op_h200"),
        "speed h200 bfloat16": partial(rivals, "op_h200_bfloat16"),
        "speed h200 int8": partial(rivals, "op_h200_int8"),
        "speed h200 compiled": partial(rivals, "op_h200_compiled"),
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
