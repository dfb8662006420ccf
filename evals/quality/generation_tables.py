"""Tables of generated answers: RULER's tasks, and long answers compared with dense attention's.

python -m evals.quality.generation_tables          # writes them between the page's markers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from evals.marked import fill
from evals.quality.arms import RESULTS, ROOT
from evals.quality.committed import markdown
from evals.quality.ruler_arms import ARMS, TASKS

PAGE = ROOT / "evals" / "generated_answers.md"
DRAWS = 10_000
NAMES = {
    "dense": "dense",
    "fasa 256": "default, 256 tokens",
    "fasa 128": "default, 128 tokens",
    "paper 256": "the paper's settings, 256 tokens",
}


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over documents; the draws depend on the number of documents only."""
    values = np.array(differences)
    drawn = np.random.default_rng(0).integers(0, len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def shown(interval: tuple[float, float, float], digits: int = 2) -> str:
    """A difference with its interval."""
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def parts_of(name: str) -> dict[str, Any]:
    """The parts of a result file."""
    parts: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["parts"]
    return parts


def scores(parts: dict[str, Any], arm: str, task: str, length: int) -> list[float]:
    """An arm's score for every document."""
    (row,) = (row for row in parts[f"{arm}/{task}"]["rows"] if row["length"] == length)
    found: list[float] = row["scores"]
    return found


def ruler() -> str:
    """Dense attention's scores, each arm's paired differences to them, and below the means over tasks."""
    parts = parts_of("ruler_smollm2")
    tasks = [task for task in TASKS if all(f"{arm}/{task}" in parts for arm in ARMS)]
    lengths = [row["length"] for row in parts[f"dense/{tasks[0]}"]["rows"]]
    others = [arm for arm in ARMS if arm != "dense"]

    def line(name: str, length: int, among: Sequence[str]) -> list[str]:
        """The mean over tasks, which have equally many documents."""
        own = {arm: [score for task in among for score in scores(parts, arm, task, length)] for arm in ARMS}
        dense = own["dense"]
        cells = [f"{sum(dense) / len(dense):.2f}"]
        for arm in others:
            cells.append(shown(paired([mine - theirs for mine, theirs in zip(own[arm], dense, strict=True)])))
        return [f"`{name}`" if name in TASKS else name, str(length), *cells]

    lines = [line(task, length, [task]) for task in tasks for length in lengths]
    lines += [line("all", length, tasks) for length in lengths]
    return markdown(["task", "tokens", "dense", *(NAMES[arm] for arm in others)], lines)


def rows_of(parts: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """An arm's rows, prompt by prompt."""
    names = sorted((name for name in parts if name.startswith(f"{arm}/")), key=lambda name: int(name.split("/")[1]))
    return [row for name in names for row in parts[name]["rows"]]


def long_generation() -> str:
    """The first tokens that differ from dense attention's answers, and dense attention's likelihood of the answers.

    A margin is the difference of logits at the first differing token; likelihoods are in nats a token, under dense
    attention.
    """
    parts = parts_of("long_generation")
    dense = rows_of(parts, "dense")

    def line(arm: str) -> list[str]:
        own = rows_of(parts, arm)
        gained = [mine["log_likelihood"] - theirs["log_likelihood"] for mine, theirs in zip(own, dense, strict=True)]
        parted = [row["first_divergence"] for row in own]
        margins = [row["margin"] for row in own if row["margin"] is not None]
        mean = sum(row["log_likelihood"] for row in own) / len(own)
        return [
            NAMES[arm],
            "-" if arm == "dense" else f"{parted.count(None)} of {len(own)}",
            f"{median(parted_at):.0f}" if (parted_at := [at for at in parted if at is not None]) else "-",
            f"{median(margins):.2f}" if margins else "-",
            f"{mean:.3f}",
            "-" if arm == "dense" else shown(paired(gained), 3),
            f"{sum(row['distinct_fours'] for row in own) / len(own):.2f}",
        ]

    head = ["", "same to the end", "first other token", "margin there", "log-likelihood", "less dense's"]
    return markdown([*head, "distinct runs of four"], [line(arm) for arm in ARMS])


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "ruler table": ("ruler_smollm2", ruler),
    "long generation table": ("long_generation", long_generation),
}
"""The result file and the function of each table, by the page's marker."""

if __name__ == "__main__":
    fill(PAGE, {name: table for name, (file, table) in TABLES.items() if (RESULTS / f"{file}.json").exists()})
