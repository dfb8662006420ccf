"""The tables of the real model in README.md and evals/docs/how_it_works.md, from the committed results.

python -m evals.quality.real_tables          # writes them between the pages' markers
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from evals.marked import fill
from evals.quality.arms import RESULTS, ROOT
from evals.quality.committed import markdown
from evals.quality.real_page import shown, window_length
from evals.quality.real_results import Results, bytes_of, perplexity

STUDY = RESULTS / "study_real" / "smollm2.json"
ARMS = {
    "dense": "dense",
    "fasa 256": "**default, 256 tokens**",
    "fasa 128": "**default, 128 tokens**",
    "fasa 64": "**default, 64 tokens**",
    "paper 256": "FASA with the paper's settings, 256 tokens",
    "oracle 256 completion=none": "exact scores, 256 tokens",
    "sparq 256 published": "SparQ as published, 256 tokens",
    "sparq 128 published": "SparQ as published, 128 tokens",
}
SETTINGS: tuple[tuple[str, str, str, str, str], ...] = (
    ("completion", "none", "first order", "fasa 128 completion=none", "what is not selected has weight and value, too"),
    ("completion", "SparQ's mean value", "first order", "fasa 128 completion=mean", "the value depends on the query"),
    (
        "strength",
        "0.5",
        "0.75",
        "fasa 128 completion_strength=0.5",
        "the best of 0.25, 0.5, 0.75 and 1 on these novels",
    ),
    ("criterion", "agreement", "variance", "fasa 128 criterion=agreement", "fast chunks hold much of the variance"),
    ("chunks", "a quarter", "half", "fasa 128 n_tip=0.25", "more chunks in fewer bits rank better"),
    ("precision", "int8", "int4", "fasa 128 packed_dtype=int8", "eight bits add nothing that shows"),
)
"""Setting, the other value, the default, the arm with the other value, and the reason for the default."""


def _perplexity(results: Results, arm: str) -> str:
    """Perplexity relative to dense attention, with its standard error over windows."""
    differences = torch.tensor(
        [window[arm] - window["dense"] for window in results["windows"].values() if arm in window]
    )
    error = float(differences.std()) / len(differences) ** 0.5
    return f"{math.exp(differences.mean()):.3f} ± {error:.3f}"


def defaults() -> str:
    """Relative perplexity, needles found among the prompts of all arms, and bytes read."""
    results: Results = json.loads(STUDY.read_text())
    length = window_length(results)
    answered = [hits for hits in results["needles"].values() if ARMS.keys() <= hits.keys()]
    return markdown(
        ["", "perplexity over dense", f"needles of {len(answered)}", "bytes read"],
        (
            [
                name,
                "1" if arm == "dense" else shown(perplexity(results, arm, length)),
                f"{sum(hits[arm] for hits in answered):.0f}",
                f"{bytes_of(results, arm, length):.1%}",
            ]
            for arm, name in ARMS.items()
        ),
    )


def settings() -> str:
    """One setting at a time changed from the defaults, at 128 tokens."""
    results: Results = json.loads((RESULTS / "real_smollm2.json").read_text())
    default = _perplexity(results, "fasa 128")
    return markdown(
        ["setting", "instead of", "perplexity", "default", "perplexity of the default", "why"],
        ([name, other, _perplexity(results, arm), ours, default, why] for name, other, ours, arm, why in SETTINGS),
    )


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"defaults table": defaults},
    ROOT / "evals" / "docs" / "how_it_works.md": {"settings table": settings},
}

if __name__ == "__main__":
    for page, tables in TABLES.items():
        fill(page, tables)
