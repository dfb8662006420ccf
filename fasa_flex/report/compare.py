"""Comparison of lm-eval runs: paired differences with bootstrap intervals, and score against budget.

Reads the folders that ``lm_eval --output_path FOLDER --log_samples`` writes. Runs are compared on a task only if every
document has the same prompt in all of them, and then document by document: sparse and dense attention mostly fail on
the same documents, so the paired difference has a much smaller error than either score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Run:
    """One run of lm-eval.

    Attributes:
        folder: its output folder.
        model: lm-eval's model name, ``hf`` or ``fasa_hf``.
        account: ``results["config"]["fasa"]``; empty for other models.
        prompts: for each task, the hash of every document's prompt and target.
        scores: for each task and metric, every document's score, averaged over its samples.
        pretrained: the loaded model's name; None if the run does not record it.
    """

    folder: Path
    model: str
    account: dict[str, Any]
    prompts: dict[str, dict[str, str]]
    scores: dict[tuple[str, str], dict[str, float]]
    pretrained: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run: the only ``results_*.json`` below ``folder``, and its ``samples_*.jsonl``.

        Raises:
            ValueError: no results, results of several runs, or no samples of a task.
        """
        folder = Path(folder)
        found = sorted(folder.rglob("results_*.json"))
        if len(found) != 1:
            raise ValueError(
                f"{folder} holds {len(found)} results of lm-eval, not one; pass the folder of a single run "
                "(give each run an --output_path of its own)."
            )
        results = _parsed(found[0])[0]
        if not isinstance(results, dict) or not {"configs", "config"} <= set(results):
            raise ValueError(f"{found[0]} is no result of lm-eval, it names no configs; pass lm_eval's --output_path.")
        stamp = found[0].stem.removeprefix("results_")
        prompts: dict[str, dict[str, str]] = {}
        scores: dict[tuple[str, str], dict[str, float]] = {}
        for task in results["configs"]:
            path = found[0].with_name(f"samples_{task}_{stamp}.jsonl")
            if not path.is_file():
                raise ValueError(f"{folder} has no samples of {task}; run lm_eval with --log_samples.")
            samples = _parsed(path, lines=True)
            prompts[task] = {str(sample["doc_id"]): sample["prompt_hash"] + sample["target_hash"] for sample in samples}
            scores |= _scores(task, samples)
        config = results["config"]
        return cls(folder, str(config["model"]), config.get("fasa", {}), prompts, scores, _pretrained(config))

    @property
    def name(self) -> str:
        """The run's name in tables: ``dense``, or the method and its budget."""
        if not self.account:
            return "dense" if self.model == "hf" else self.model
        return f"{self.method}, {self.budget}"

    @property
    def method(self) -> str:
        """``fasa``, a baseline's name, or ``dense`` without an account."""
        return str(self.account.get("method", "dense"))

    @property
    def budget(self) -> int | float | None:
        """``n_fac``; None for dense attention."""
        return cast("int | float | None", self.account.get("n_fac"))

    def sparse_queries(self, task: str) -> int | None:
        """Number of the task's sparse queries; None if the run has no account."""
        return cast("int | None", self.account.get("tasks", {}).get(task, {}).get("sparse_queries"))


@dataclass(frozen=True)
class Row:
    """One metric of one run, compared with the first run.

    Attributes:
        task: the task's name.
        metric: the metric's name, followed by the filter if that is not ``none``.
        run: the run.
        score: mean over documents.
        interval: 95 % bootstrap interval of the score.
        difference: mean over documents of this run's score minus the first run's; None for the first run.
        difference_interval: 95 % paired bootstrap interval of the difference.
        documents: number of documents.
    """

    task: str
    metric: str
    run: Run
    score: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    documents: int


def compare(runs: Sequence[Run], draws: int = DRAWS, seed: int = 0) -> list[Row]:
    """Compare runs in every metric that all of them have.

    Args:
        runs: two or more; the others are compared with the first.
        draws: bootstrap resamples of the documents, the same for all runs.
        seed: seed of the private generator of the resamples.

    Raises:
        ValueError: fewer than two runs, no draws, no common task, different prompts, or scores of other documents.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}; a bootstrap of 10000 is usual.")
    if len(runs) < 2:
        raise ValueError(f"comparing needs at least two runs, got {len(runs)}; pass their output folders.")
    shared = [key for key in runs[0].scores if all(key in run.scores for run in runs)]
    if not shared:
        raise ValueError(f"{runs[0].folder} and the others have no task and metric in common; run the same --tasks.")
    for run in runs[1:]:
        check_prompts(runs[0], run, sorted({task for task, _ in shared}))
    rows = []
    for task, metric in shared:
        documents = sorted(runs[0].scores[task, metric])
        for run in runs[1:]:
            others = set(documents) ^ set(run.scores[task, metric])
            if others:
                raise ValueError(
                    f"{runs[0].folder} and {run.folder} have {metric} of {task} for different documents, "
                    f"{min(others)} among them; run the task anew, with the same --limit."
                )
        table = np.array([[run.scores[task, metric][doc] for doc in documents] for run in runs])
        drawn = np.random.default_rng(seed).integers(0, len(documents), size=(draws, len(documents)))
        means = np.stack([values[drawn].mean(1) for values in table])
        for number, run in enumerate(runs):
            rows.append(
                Row(
                    task=task,
                    metric=metric,
                    run=run,
                    score=float(table[number].mean()),
                    interval=_interval(means[number]),
                    difference=float((table[number] - table[0]).mean()) if number else None,
                    difference_interval=_interval(means[number] - means[0]) if number else None,
                    documents=len(documents),
                )
            )
    return rows


def check_prompts(first: Run, other: Run, tasks: Sequence[str]) -> None:
    """Refuse two runs with different prompts.

    Raises:
        ValueError: with the first such task and the number of its prompts that differ.
    """
    for task in tasks:
        one, two = first.prompts[task], other.prompts[task]
        differing = [doc for doc in sorted(one.keys() | two.keys()) if one.get(doc) != two.get(doc)]
        if differing:
            raise ValueError(
                f"{len(differing)} of {len(one.keys() | two.keys())} prompts of {task} differ between "
                f"{first.folder} and {other.folder}, the first in document {differing[0]}; run both with the same "
                "--limit, --metadata, seeds, tokenizer and chat template."
            )


def warnings(runs: Sequence[Run]) -> list[str]:
    """Warnings of the runs' accounts, and differences between runs that a table does not show."""
    found = [f"{run.name}: {warning}" for run in runs for warning in run.account.get("warnings", ())]
    profiles = {run.account["profile"] for run in runs if run.method == "fasa" and run.account.get("profile")}
    if len(profiles) > 1:
        found.append(f"the FASA runs use {len(profiles)} different profiles")
    models = sorted({run.pretrained for run in runs if run.pretrained})
    if len(models) > 1:
        found.append(f"the runs are of different models: {', '.join(models)}")
    for number, run in enumerate(runs):
        for other in runs[number + 1 :]:
            if run.account and run.name == other.name and (differing := _settings_that_differ(run, other)):
                names = ", ".join(differing)
                found.append(f"{run.folder} and {other.folder} are both {run.name} and differ in {names}")
    return found


def _settings_that_differ(run: Run, other: Run) -> list[str]:
    """Names of the settings in which two accounts differ."""
    results = {"tasks", "requests", "warnings", "versions", "calibration", "stays_dense", "truncated_inputs"}
    results |= {"shared_prefills", "processes", "profile"}
    names = sorted((run.account.keys() | other.account.keys()) - results)
    return [name for name in names if run.account.get(name) != other.account.get(name)]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| task | metric | attention | budget | score | 95 % interval | difference to the first | paired 95 % interval "
        "| KV bytes read | sparse queries | documents |",
        "|---|---|---|--:|--:|:-:|--:|:-:|--:|--:|--:|",
    ]
    for row in rows:
        account: Mapping[str, Any] = row.run.account.get("tasks", {}).get(row.task, {})
        read = account.get("kv_bytes_share")
        lines.append(
            f"| {row.task} | {row.metric} | {row.run.method} | {'-' if row.run.budget is None else row.run.budget} "
            f"| {row.score:.4g} | {_shown(row.interval)} "
            f"| {'' if row.difference is None else f'{row.difference:+.4g}'} | {_shown(row.difference_interval)} "
            f"| {'' if read is None else f'{read:.1%}'} | {account.get('sparse_queries', '')} | {row.documents} |"
        )
    return "\n".join(lines)


def curve_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for `fasa_flex.report.plots.score_curves`: a panel for each task and metric, with standard errors."""
    metrics = {(row.task, row.metric) for row in rows}
    single = {task for task, _ in metrics if sum(task == other for other, _ in metrics) == 1}
    return [
        {
            "task": row.task if row.task in single else f"{row.task}, {row.metric}",
            "metric": row.metric,
            "method": row.run.method,
            "budget": row.run.budget,
            "score": row.score,
            "stderr": (row.interval[1] - row.interval[0]) / 2 / 1.96,
        }
        for row in rows
    ]


def _scores(task: str, samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """The metrics of a task that are one number for each document, or the pair of a perplexity."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = _number(metric, sample[metric])
            if value is None or (metric.isdigit() and value == -1):  # RULER's mark of documents of another length
                continue
            name = f"{metric} [nats per unit]" if isinstance(sample[metric], list) else metric
            if sample["filter"] != "none":
                name = f"{name},{sample['filter']}"
            found.setdefault((task, name), {}).setdefault(str(sample["doc_id"]), []).append(value)
    return {key: {doc: float(np.mean(values)) for doc, values in docs.items()} for key, docs in found.items()}


def _number(metric: str, value: Any) -> float | None:
    """A document's value; for a perplexity's pair (log-likelihood, length), nats a unit, where lower is better.

    None for other pairs: those of F1 and MCC are a document's gold and predicted class, which have no mean.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    perplexity = metric.endswith("perplexity") or metric == "bits_per_byte"
    if perplexity and isinstance(value, list | tuple) and len(value) == 2 and value[1]:
        return -float(value[0]) / float(value[1])
    return None


def _parsed(path: Path, lines: bool = False) -> list[Any]:
    """The values of a JSON file, or of a file with one JSON value a line; only a newline ends a line."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            return [json.loads(text) for text in (file if lines else [file.read()])]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON of lm-eval ({error}); run lm_eval again.") from error


def _pretrained(config: Mapping[str, Any]) -> str | None:
    """The argument ``pretrained`` of lm-eval's ``model_args``."""
    arguments = config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(word.partition("=")[::2] for word in arguments.split(","))
    found = arguments.get("pretrained") if isinstance(arguments, Mapping) else None
    return None if found is None else str(found)


def _interval(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} … {interval[1]:.4g}"
