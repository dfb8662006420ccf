"""Sweeps over arms of lm-eval: several run at one time, each is written when measured, scores have intervals.

An arm answers the first documents of each task. The sweep stops if arms see different documents. Intervals are 95 %
bootstrap intervals over documents, with the same draws in every arm, so that differences can be paired.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from evals.quality.arms import (
    FORMER,
    LENGTH,
    MODEL,
    N_TIP,
    Arm,
    PartLedger,
    calibrate_reference,
    calibration_prompts,
    evaluate,
    prompt_hashes,
    quiet,
    rows_of,
)

DRAWS = 10_000
POOLED = {"bits_per_byte": 1 / math.log(2), "token_perplexity": 1.0}
"""Metrics that divide by the units of all documents, with the factor from nats to their unit."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Questions:
    """The documents of one run of lm-eval.

    Attributes:
        counts: for each task, the number of its first documents to use.
        length: tokens of a document.
        arguments: arguments of ``fasa_hf`` in addition to the arm's.
        suffix: suffix of the tasks' names in rows.
    """

    counts: Mapping[str, int]
    length: int = LENGTH
    arguments: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Calibrated:
    """Calibrations of the methods to the reference model, on the same prompts, once for all arms.

    Attributes:
        arguments: arguments of ``fasa_hf`` for each calibrated method.
        fingerprints: hashes of the dimensions or the text that each method uses; a profile's own fingerprint would also
            cover frequencies, which are measured anew each time.
    """

    arguments: Mapping[str, Mapping[str, str]]
    fingerprints: Mapping[str, str]

    @classmethod
    def into(cls, folder: Path) -> Calibrated:
        """Calibrate, and write profiles and prompts to ``folder``."""
        profiles = calibrate_reference(folder / "planes"), calibrate_reference(folder / "pairs", adjacent=True)
        planes, pairs = (
            hashlib.sha256(profile.dominant_dims(N_TIP, criterion=FORMER["criterion"]).numpy().tobytes()).hexdigest()
            for profile in profiles
        )
        text = "\n".join(calibration_prompts(AutoTokenizer.from_pretrained(MODEL)))
        (folder / "prompts.txt").write_text(text, encoding="utf-8")
        arguments = {
            "fasa": {"profile": str(folder / "planes")},
            "random_chunks": {"profile": str(folder / "planes")},
            "adjacent_pairs": {"profile": str(folder / "pairs")},
            "double_sparsity": {"calibration_source": str(folder / "prompts.txt")},
        }
        text_hash = hashlib.sha256(text.encode()).hexdigest()
        return cls(arguments, dict(zip(arguments, (planes, planes, pairs, text_hash), strict=True)))


def sparse_arm(name: str, budget: int | float, dense_layers: str = "none", **arguments: Any) -> Arm:
    """An arm of ``fasa_hf`` with the settings `FORMER`, overridden by ``arguments``."""
    given = {**FORMER, "n_fac": budget, "dense_layers": dense_layers, **arguments}
    return Arm(name, "fasa_hf", budget, given)


DENSE = Arm("dense", "hf")


def sweep(
    ledger: PartLedger,
    arms: Sequence[Arm],
    asked: Sequence[Questions],
    calibrated: Calibrated,
    processes: int,
    name: str,
) -> Rows:
    """The rows of all arms, first dense attention's; arms in the ledger are not measured again.

    Args:
        ledger: the ledger, with one part for each arm.
        arms: the sparse arms.
        asked: the documents of every arm.
        calibrated: the methods' calibrations.
        processes: arms that run at one time, each with one thread.
        name: name of the sweep, a prefix of its parts' names.
    """
    begun = time.time()
    by_name = {f"{name}: {arm}": arm for arm in (DENSE, *arms)}
    settings = {
        part: {
            "arguments": arm.arguments,
            "asked": [vars(questions) for questions in asked],
            "calibrated": calibrated.fingerprints.get(arm.arguments.get("method", "")),
        }
        for part, arm in by_name.items()
    }
    todo = [part for part in by_name if ledger.kept(part, settings[part]) is None]
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_alone) as pool:
        waiting = {pool.submit(measured, by_name[part], asked, calibrated): part for part in todo}
        for number, done in enumerate(as_completed(waiting), 1):
            part, (seconds, rows) = waiting[done], done.result()
            ledger.keep(part, settings[part], seconds, rows)
            scores = ", ".join(f"{row['task']} {row['score']:.3f}" for row in rows)
            print(f"[{number}/{len(todo)}, {time.time() - begun:.0f} s] {part} ({seconds:.0f} s): {scores}", flush=True)
    rows = [row for part in by_name for row in ledger.parts[part]["rows"]]
    check_prompts(rows)
    return rows


def measured(arm: Arm, asked: Sequence[Questions], calibrated: Calibrated) -> tuple[float, Rows]:
    """Seconds and rows of an arm."""
    begun = time.time()
    rows: Rows = []
    for questions in asked:
        given = dict(arm.arguments)
        if arm.model != DENSE.model:
            given |= {**questions.arguments, **calibrated.arguments.get(given["method"], {})}
        results = evaluate(Arm(arm.method, arm.model, arm.budget, given), questions.counts, questions.length)
        rows += [row_of(row, results, questions.suffix) for row in rows_of(arm, results)]
    return time.time() - begun, rows


def row_of(row: Mapping[str, Any], results: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
    """A row of `rows_of`, with its interval, its documents' scores and the hash of their prompts."""
    task, metric = row["task"], row["metric"]
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    if metric in POOLED:
        pairs = [sample[metric] for sample in samples]
        units = [length for _, length in pairs]
        values = [-loglikelihood * POOLED[metric] / length for loglikelihood, length in pairs]
    else:
        units, values = None, [float(sample[metric]) for sample in samples]
    extended = {
        "task": task + suffix,
        "metric": metric,
        "method": row["method"],
        "budget": row["budget"],
        "score": row["score"],
        "low": None,
        "high": None,
        "kv_share": row["attended"],
        "kv_bytes_share": row["read"],
        "sparse_queries": row["sparse_queries"],
        "documents": row["documents"],
        "prompts": prompt_hashes(results)[task],
        "by_document": [round(value, 5) for value in values],
        **({"units": units} if units else {}),
    }
    low, high = np.quantile(drawn_scores(extended), [0.025, 0.975])
    return {**extended, "low": round(float(low), 5), "high": round(float(high), 5)}


def drawn_scores(row: Mapping[str, Any]) -> Any:
    """The row's score over `DRAWS` bootstrap samples of its documents: float64 [DRAWS]."""
    values = np.array(row["by_document"])
    units = np.array(row.get("units", [1] * len(values)), dtype=float)
    drawn = np.random.default_rng(0).multinomial(len(values), [1 / len(values)] * len(values), size=DRAWS)
    means = drawn @ (values * units) / (drawn @ units)
    return np.exp(means) if row["metric"] == "token_perplexity" else means


def difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """Score of ``row`` less that of ``other``, with the paired interval: mean, low, high."""
    check_prompts([row, other])
    low, high = np.quantile(drawn_scores(row) - drawn_scores(other), [0.025, 0.975])
    return row["score"] - other["score"], float(low), float(high)


def check_prompts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exit if the arms of a task have different prompts."""
    prompts: dict[str, str] = {}
    for row in rows:
        if prompts.setdefault(row["task"], row["prompts"]) != row["prompts"]:
            sys.exit(f"{row['method']} has other prompts of {row['task']}, so scores cannot be compared.")


def _alone() -> None:
    """Set up a worker process: quiet, with one thread."""
    quiet()
    torch.set_num_threads(1)
