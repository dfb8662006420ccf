"""Shared by the parts of the study: arms of lm-eval and their rows, provenance of results, result files.

An arm is one model in a comparison. All arms must see the same prompts (`prompt_hashes`) and every sparse arm must
have sparse queries (`rows_of`). A `PartLedger` writes each part as soon as it is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.reference_model.corpus import training_text
from fasa_flex import FasaProfile, RotaryLayout, calibrate
from fasa_flex.baselines import adjacent_pairs, unheard
from fasa_flex.bench import record
from fasa_flex.calibration.provenance import version_of
from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.haystack import Document, document
from fasa_flex.saving import replace_text

ROOT = Path(os.path.relpath(Path(__file__).parents[2]))  # relative, so that results contain no local folders
MODEL = ROOT / "evals" / "reference_model"
RESULTS = ROOT / "evals" / "results"

LENGTH = 2048
N_TIP = 8
N_FACTS = 8
FORMER: dict[str, Any] = {
    "n_tip": N_TIP,
    "n_sink": 0,
    "n_recent": 0,
    "criterion": "agreement",
    "group_reduce": "softmax_exact",
    "packed_dtype": None,
    "completion": "none",
}
"""Fields of `fasa_flex.FasaConfig` in the study's results, the defaults at that time.

Chunks by agreement in the cache's precision, no forced tokens, groups ranked by attention weights, no completion.
"""
CALIBRATION_SAMPLES = 4
ANSWER_TOKENS = 5
"""Decode steps of a sample, those of the answer; queries that write source text agree on other chunks."""
METRICS = {
    "fasa_needle": "exact_match",
    "fasa_needle_single": "exact_match",
    "fasa_needle_multikey": "exact_match",
    "fasa_needle_multivalue": "found",
    "fasa_needle_multiquery": "found",
    "fasa_recall": "acc",
    "fasa_recall_long": "acc",
    "fasa_variables": "found",
    "fasa_copy": "copied",
    "fasa_count": "listed",
    "fasa_ppl": "bits_per_byte",
    "fasa_ppl_position": "token_perplexity",
    "topics_needles": "acc",
    "topics_text": "nats",
}
"""The reported metric of each task, the packaged ones and the demo's."""


@dataclass(frozen=True)
class Arm:
    """One model of a comparison; a ``budget`` below 1 is a share of the keys."""

    method: str
    model: str
    budget: int | float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.budget is None:
            return self.method
        return f"{self.method}, " + (f"{self.budget} tokens" if self.budget >= 1 else f"{self.budget:.0%} of the keys")


class PartLedger:
    """A JSON file of parts with settings of their own, each written as soon as it is measured; a run can be continued.

    Args:
        path: the file; its folder is created.
        head: `provenance` of the last run; its seconds are replaced by the sum over parts.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path, self.head = path, dict(head)
        self.parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}

    def part(
        self, name: str, settings: Mapping[str, Any], measure: Callable[[], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows of a part, from the file if its settings are the same, otherwise measured now.

        Args:
            name: name of the part.
            settings: everything that decides its rows, JSON-ready.
            measure: returns the rows, JSON-ready.
        """
        rows = self.kept(name, settings)
        if rows is None:
            begun = time.time()
            rows = measure()
            self.keep(name, settings, time.time() - begun, rows)
        return rows

    def kept(self, name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The rows of a part in the file with the same settings; None if there is none."""
        part = self.parts.get(name)
        if part is None or part["settings"] != json.loads(json.dumps(settings)):
            return None
        rows: list[dict[str, Any]] = part["rows"]
        return rows

    def keep(self, name: str, settings: Mapping[str, Any], seconds: float, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a part to the file, in place of former rows under this name."""
        self.parts[name] = {"settings": json.loads(json.dumps(settings)), "seconds": round(seconds), "rows": rows}
        self.write()

    def write(self) -> None:
        """Replace the file atomically."""
        seconds = sum(part["seconds"] for part in self.parts.values())
        replace_text(self.path, json.dumps({**self.head, "seconds": seconds, "parts": self.parts}, indent=1) + "\n")


def quiet() -> None:
    """Silence warnings of lm-eval and fasa_hf, and progress bars of transformers."""
    for name in ("lm_eval", "fasa_flex"):  # `rows_of` refuses arms without sparse queries
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def haystack(seed: str, length: int, tokenizer: Any, text: str | None = None) -> Document:
    """A document of at most ``length`` tokens with `N_FACTS` facts, cut from ``text`` or the held-out text."""
    return document(
        Random(seed),
        length=length,
        count_tokens=lambda string: len(tokenizer(string).input_ids),
        n_facts=N_FACTS,
        text=text,
    )


def calibration_prompts(tokenizer: Any) -> list[str]:
    """The reference model's calibration texts: a few documents of training text, which end on a question."""
    text = training_text()
    return [
        haystack(f"calibration/{number}", LENGTH - 64, tokenizer, text).prompt for number in range(CALIBRATION_SAMPLES)
    ]


def calibrate_reference(folder: Path, steps: int = ANSWER_TOKENS, adjacent: bool = False) -> FasaProfile:
    """The reference model's profile, from ``steps`` decode steps on each of the `calibration_prompts`.

    Args:
        folder: folder for the profile.
        steps: decode steps of each prompt.
        adjacent: measure adjacent pairs of dimensions in place of the model's planes.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    layout = adjacent_pairs(RotaryLayout.detect(model)) if adjacent else None
    samples = calibration_prompts(tokenizer)
    profile = calibrate(model, samples, tokenizer=tokenizer, max_new_tokens=steps, layout=layout)
    profile.save_pretrained(folder)
    return profile


def evaluate(arm: Arm, counts: Mapping[str, int], length: int = LENGTH) -> dict[str, Any]:
    """lm-eval's results of one arm.

    Args:
        arm: the arm.
        counts: for each task, the number of its first documents to use.
        length: tokens of a document.
    """
    from lm_eval import simple_evaluate  # imported here, since some parts do not need lm-eval
    from lm_eval.tasks import TaskManager

    metadata = {"max_seq_lengths": [length], "tokenizer": str(MODEL), "num_docs": max(counts.values())}
    results = simple_evaluate(
        model=arm.model,
        model_args={"pretrained": str(MODEL), **heard(arm.arguments)},
        tasks=list(counts),
        samples={task: list(range(count)) for task, count in counts.items()},
        batch_size=4,
        device="cpu",
        bootstrap_iters=200,
        task_manager=TaskManager(include_path=str(TASKS_PATH), include_defaults=False, metadata=metadata),
    )
    assert results is not None, "only the first process of several has results; run the study in one"
    return results


def heard(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``fasa_hf`` without those that its method does not use."""
    unused = unheard(arguments.get("method", "fasa"))
    return {name: value for name, value in arguments.items() if name not in unused}


def rows_of(arm: Arm, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each task, with the shares of keys that its sparse queries attend to and read, ranking included."""
    fasa = results["config"].get("fasa", {})
    for task in (task for task in METRICS if task in results["configs"]):
        metric = METRICS[task]
        scores = results["results"][task]
        kind = results["configs"][task]["output_type"]
        account = fasa.get("tasks", {}).get(task) or fasa.get("requests", {}).get(kind, {})
        if arm.budget is not None and not account.get("sparse_queries"):
            sys.exit(f"{arm} had no sparse query in {task}, so its result is dense attention; use longer documents.")
        stderr = scores.get(f"{metric}_stderr,none")
        yield {
            "task": task,
            "metric": metric,
            "method": arm.method,
            "budget": arm.budget,
            "score": scores[f"{metric},none"],
            "stderr": stderr if isinstance(stderr, float) else None,
            "documents": results["n-samples"][task]["effective"],
            "attended": 1.0 if arm.budget is None else account["kv_share"],
            "read": 1.0 if arm.budget is None else account["kv_bytes_share"],
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
    for task in dict.fromkeys(row["task"] for row in rows):
        for row in (row for row in rows if row["task"] == task):
            stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            lines.append(
                f"| {task} ({row['metric']}) | {row['method']} | {row['budget'] or '-'} | {row['score']:.3f}{stderr} "
                f"| {row['attended']:.1%} | {row['read']:.1%} | {row['sparse_queries']} |"
            )
    return "\n".join(lines)


def hardware() -> str:
    """Processor and number of cores."""
    machine = record.hardware(torch.device("cpu"))
    return f"{machine['cpu']}, {machine['cores']} cores"


def provenance(begun: float, **shared: Any) -> dict[str, Any]:
    """Origin of a result: command, date, duration, machine, versions, and settings of all rows.

    Args:
        begun: `time.time` at the start.
        shared: settings of all rows, JSON-ready.
    """
    return {
        "command": record.command_line("evals.quality." + Path(sys.argv[0]).stem),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("fasa-flex", "lm-eval", "torch", "transformers")},
        **shared,
    }
