"""The page of the sparse prefill against the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.quality.real_page import shown
from evals.quality.real_results import perplexity

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "evals/docs/sparse_prefill.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "evals/results/study_real/smollm2_prefill.json").read_text(encoding="utf-8"))
WAYS = ("", " prefill_completion=mean", " estimator=window")


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5])
def test_perplexities_are_those_of_the_results(share: float) -> None:
    figures = [shown(perplexity(RESULTS, f"fasa 1.0 blocks={share}{way}")) for way in WAYS]
    assert f"| {share:.0%} | ".replace("%", " %") + " | ".join(figures) + " |" in PAGE
    assert len(RESULTS["windows"]) == 12
    assert all(name.startswith("8192/") for name in RESULTS["windows"])


def test_random_blocks_lose_twice_as_much() -> None:
    random, own = (perplexity(RESULTS, f"fasa 1.0 blocks=0.2{way}") for way in (" estimator=random", ""))
    assert random is not None
    assert own is not None
    assert f"({random.mean:.3f} at 20 %)" in PAGE
    assert 1.9 < (random.mean - 1) / (own.mean - 1) < 2.1


def test_the_large_model_loses_no_needle() -> None:
    large = json.loads((ROOT / "evals/results/study_large/prefill/large.json").read_text(encoding="utf-8"))
    rows = [row for row in large["parts"]["prefill"]["rows"] if row["task"] == "needles"]
    assert {row["mean"] for row in rows} == {1.0}
    assert "random" in {row.get("estimator") for row in rows}
