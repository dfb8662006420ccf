"""The demo refuses to print a table that would mislead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed package

from evals.quality import demo

FASA = demo.Arm("FASA", "fasa_hf", 64)
KINDS = {"fasa_needle": "generate_until", "fasa_recall": "loglikelihood", "fasa_ppl": "loglikelihood_rolling"}


def results(sparse_queries: int) -> dict[str, Any]:
    account = {"dense_queries": 5, "sparse_queries": sparse_queries, "kv_share": 0.03, "kv_bytes_share": 0.155}
    return {
        "results": {
            task: {f"{metric},none": 0.5, f"{metric}_stderr,none": "N/A"} for task, (metric, _) in demo.TASKS.items()
        },
        "config": {"fasa": {"requests": dict.fromkeys(KINDS.values(), account)}},
        "configs": {task: {"output_type": kind} for task, kind in KINDS.items()},
        "n-samples": {task: {"effective": 7} for task in KINDS},
        "samples": {task: [{"doc_id": 1, "prompt_hash": "b"}, {"doc_id": 0, "prompt_hash": "a"}] for task in KINDS},
    }


def test_rows_carry_the_account() -> None:
    rows = list(demo.rows_of(FASA, results(sparse_queries=9)))
    assert [row["task"] for row in rows] == list(KINDS)
    assert rows[0] | {"task": None} == {
        "task": None,
        "metric": "exact_match",
        "method": "FASA",
        "budget": 64,
        "score": 0.5,
        "stderr": None,
        "documents": 7,
        "attended": 0.03,
        "read": 0.155,
        "sparse_queries": 9,
    }
    assert "| fasa_needle (exact_match) | FASA | 64 | 0.500 | 3.0% | 15.5% | 9 |" in demo.table(rows)


def test_a_sparse_arm_without_sparse_queries_stops_the_demo() -> None:
    with pytest.raises(SystemExit, match="FASA, 64 tokens had no sparse query in fasa_needle"):
        list(demo.rows_of(FASA, results(sparse_queries=0)))


def test_prompts_are_compared_in_document_order() -> None:
    one, other = results(1), results(1)
    other["samples"]["fasa_ppl"].reverse()
    assert demo.prompt_hashes(one) == demo.prompt_hashes(other)
    other["samples"]["fasa_ppl"][0]["prompt_hash"] = "c"
    assert demo.prompt_hashes(one)["fasa_ppl"] != demo.prompt_hashes(other)["fasa_ppl"]


def test_every_arm_has_its_budget() -> None:
    arms = demo.arms(Path("profile"))
    assert [arm.budget for arm in arms] == [None, *demo.BUDGETS, *demo.BUDGETS]
    assert all(arm.arguments["n_fac"] == arm.budget for arm in arms[1:])
    assert {arm.arguments["method"] for arm in arms[1:]} == {"fasa", "streaming_llm"}
