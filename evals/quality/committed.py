"""Reading of the study's committed results, and formatting of their rows in tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evals.quality.arms import RESULTS
from evals.quality.sweep import Rows

STUDY, LARGE = RESULTS / "study", RESULTS / "study_large"
NEEDLE, DECODED, TEXT = "fasa_needle", "fasa_recall, question decoded", "fasa_ppl"


def parts_of(name: str, folder: Path = STUDY) -> dict[str, Any]:
    """The parts of a result file of the study."""
    parts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["parts"]
    return parts


def rows_of(name: str, sweep: str) -> Rows:
    """All rows of a sweep."""
    return [row for part, content in parts_of(name).items() if part.startswith(f"{sweep}: ") for row in content["rows"]]


def row_of(rows: Rows, task: str, method: str, budget: float | None = None) -> dict[str, Any]:
    """The row of a task, a method and a budget; None for dense attention."""
    wanted = (task, method, None if method == "dense" else budget)
    (row,) = (row for row in rows if (row["task"], row["method"], row["budget"]) == wanted)
    return row


def by_kind(rows: Rows, **wanted: Any) -> str:
    """A figure for steps that answer, and for steps that write text."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    (answer,), (text,) = ([row["mean"] for row in found if row["queries"] == kind] for kind in ("answer", "text"))
    return f"{answer:.3f} / {text:.3f}"


def score_of(row: Mapping[str, Any]) -> str:
    """The score, with its interval unless it is bits a byte."""
    if row["metric"] != "bits_per_byte":
        return f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['score']:.3f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with numbers in all columns but the first."""
    ruler = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *lines))


def mean_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for one value."""
    values = list(values)
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
