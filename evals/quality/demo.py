"""The reference model with dense attention, with FASA, and with a control, side by side in lm-eval.

    python -m evals.quality.demo          # under ten minutes on two cores; or `nox -s demo`

Calibrates on documents made of text that the tasks never use, then runs the packaged tasks once for each arm. The
control keeps eight sinks and the most recent tokens, at the same budget. Every arm must see the same prompts, and every
sparse arm must have had sparse queries; otherwise the demo stops. Writes ``demo.json``, ``demo.png`` (score against
budget), ``agreement.png`` (what calibration found) and the profile to ``evals/results/``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import transformers
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.reference_model.corpus import training_text
from fasa_flex import FasaProfile, calibrate
from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.haystack import document
from fasa_flex.plots import agreement_heatmap, score_curves

ROOT = Path(os.path.relpath(Path(__file__).parents[2]))  # relative, so that results name no machine's folders
MODEL = ROOT / "evals" / "reference_model"
RESULTS = ROOT / "evals" / "results"

LENGTH = 2048
N_TIP = 8
BUDGETS = (32, 64, 128, 256)
CALIBRATION_SAMPLES = 4
ANSWER_TOKENS = 5
"""Decode steps a sample contributes: those that answer. Queries that write source text agree on other chunks."""
TASKS = {"fasa_needle": ("exact_match", 64), "fasa_recall": ("acc", 32), "fasa_ppl": ("bits_per_byte", 4)}
"""Each task's metric and how many of its documents are used."""


@dataclass(frozen=True)
class Arm:
    """One model in the table; ``scoring`` is what choosing the keys reads, as a share of all keys and values."""

    method: str
    model: str
    budget: int | None = None
    scoring: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method}, {self.budget} tokens"


def arms(profile: Path, head_dim: int) -> list[Arm]:
    """Dense attention, then FASA and the control at every budget."""
    shared = {"profile": str(profile), "n_tip": N_TIP}
    sparse = [
        Arm(name, "fasa_hf", budget, scoring, {**shared, "method": method, "n_fac": budget})
        for name, method, scoring in (("FASA", "fasa", N_TIP / head_dim), ("sinks + recent", "streaming_llm", 0.0))
        for budget in BUDGETS
    ]
    return [Arm("dense", "hf"), *sparse]


def calibrate_reference(folder: Path, steps: int = ANSWER_TOKENS) -> FasaProfile:
    """The reference model's profile, from ``steps`` decode steps on each of a few documents made of training text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    text = training_text()
    samples = [
        document(
            Random(f"calibration/{number}"),
            length=LENGTH - 64,
            count_tokens=lambda string: len(tokenizer(string).input_ids),
            n_facts=8,
            text=text,
        ).prompt
        for number in range(CALIBRATION_SAMPLES)
    ]
    profile = calibrate(model, samples, tokenizer=tokenizer, max_new_tokens=steps)
    profile.save_pretrained(folder)
    return profile


def evaluate(arm: Arm, counts: Mapping[str, int]) -> dict[str, Any]:
    """lm-eval's results of one arm."""
    metadata = {"max_seq_lengths": [LENGTH], "tokenizer": str(MODEL), "num_docs": max(counts.values())}
    results = simple_evaluate(
        model=arm.model,
        model_args={"pretrained": str(MODEL), **arm.arguments},
        tasks=list(counts),
        samples={task: list(range(count)) for task, count in counts.items()},
        batch_size=4,
        device="cpu",
        bootstrap_iters=200,
        task_manager=TaskManager(include_path=str(TASKS_PATH), include_defaults=False, metadata=metadata),
    )
    assert results is not None, "only the first process of several has results; run the demo in one"
    return results


def rows_of(arm: Arm, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a task, with the account of its sparse queries."""
    kinds = results["config"].get("fasa", {}).get("requests", {})
    for task, (metric, _) in TASKS.items():
        scores = results["results"][task]
        account = kinds.get(results["configs"][task]["output_type"], {})
        if arm.budget is not None and not account.get("sparse_queries"):
            sys.exit(f"{arm} had no sparse query in {task}: its result is dense attention, and the table would mislead")
        stderr = scores.get(f"{metric}_stderr,none")
        attended = account.get("kv_share", 1.0)
        yield {
            "task": task,
            "metric": metric,
            "method": arm.method,
            "budget": arm.budget,
            "score": scores[f"{metric},none"],
            "stderr": stderr if isinstance(stderr, float) else None,
            "documents": results["n-samples"][task]["effective"],
            "attended": attended,
            "read": attended + arm.scoring,
            "sparse_queries": account.get("sparse_queries", 0),
        }


def prompt_hashes(results: Mapping[str, Any]) -> dict[str, str]:
    """One hash for all prompts of a task, in document order."""
    ordered = {task: sorted(docs, key=lambda doc: doc["doc_id"]) for task, docs in results["samples"].items()}
    return {
        task: hashlib.sha256("".join(doc["prompt_hash"] for doc in docs).encode()).hexdigest()
        for task, docs in ordered.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, task by task."""
    lines = [
        "| task | attention | budget | score | keys and values attended | read, scoring included | sparse queries |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for task in TASKS:
        for row in (row for row in rows if row["task"] == task):
            stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            lines.append(
                f"| {task} ({row['metric']}) | {row['method']} | {row['budget'] or '-'} | {row['score']:.3f}{stderr} "
                f"| {row['attended']:.1%} | {row['read']:.1%} | {row['sparse_queries']} |"
            )
    return "\n".join(lines)


def hardware() -> str:
    """Processor and number of usable cores."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def provenance(begun: float, profile: FasaProfile) -> dict[str, Any]:
    """What made a result: command, date, duration, machine, versions, and what the arms share."""
    module = "evals.quality." + Path(sys.argv[0]).stem
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fasa-flex", "lm-eval", "torch", "transformers")},
        "profile": profile.fingerprint,
        "length": LENGTH,
        "n_tip": N_TIP,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, help="at most so many documents of each task (for a quick look)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: evals/results)")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts = {task: min(count, options.documents or count) for task, (_, count) in TASKS.items()}

    begun = time.time()
    profile = calibrate_reference(options.out / "profile")
    rows: list[dict[str, Any]] = []
    prompts: dict[str, str] = {}
    todo = arms(options.out / "profile", profile.layout.head_dim)
    for number, arm in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}, {time.time() - begun:.0f} s] {arm}", flush=True)
        results = evaluate(arm, counts)
        prompts = prompts or prompt_hashes(results)
        if prompt_hashes(results) != prompts:
            sys.exit(f"{arm} saw other prompts than dense attention did: the scores cannot be compared")
        rows += (new := list(rows_of(arm, results)))
        print("   ", ", ".join(f"{row['task']} {row['score']:.3f}" for row in new), flush=True)

    record = {**provenance(begun, profile), "prompts": prompts, "rows": rows, "table": table(rows)}
    (options.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    score_curves(rows).savefig(options.out / "demo.png", dpi=150)
    agreement_heatmap(profile, N_TIP).savefig(options.out / "agreement.png", dpi=150)
    print(f"\n{record['table']}\n\nwritten to {options.out} after {record['seconds']} s; all arms saw the same prompts")


if __name__ == "__main__":
    main()
