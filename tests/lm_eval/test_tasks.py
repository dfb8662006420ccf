"""Every packaged task through lm-eval itself: at full budget `fasa_hf` is `hf`, and below it every task is sparse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.model import FasaHFLM

TASKS = sorted(path.stem for path in TASKS_PATH.glob("*.yaml"))
POSITIONS = 768
GENERATED_TOKENS = 12  # of at most 192: a random model has nothing to say


def evaluate(lm: LM, checkpoint: Path) -> dict[str, Any]:
    metadata = {"max_seq_lengths": [560, 640], "num_docs": 1, "tokenizer": str(checkpoint)}
    results = simple_evaluate(
        model=lm,
        tasks=list(TASKS),
        limit=2,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": GENERATED_TOKENS},
        task_manager=TaskManager(include_path=str(TASKS_PATH), include_defaults=False, metadata=metadata),
    )
    assert results is not None
    return dict(results)


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> dict[str, Any]:
    return evaluate(HFLM(str(checkpoint), device="cpu", batch_size=1), checkpoint)


@pytest.fixture(scope="module", params=[1, 4])
def full(request: pytest.FixtureRequest, checkpoint: Path, profile: Path) -> dict[str, Any]:
    lm = FasaHFLM(
        str(checkpoint), profile=str(profile), n_fac=POSITIONS, n_tip=2, device="cpu", batch_size=request.param
    )
    return evaluate(lm, checkpoint)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, bool | int | float):
        yield float(value)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)


@pytest.mark.parametrize("task", TASKS)
def test_at_full_budget_every_document_scores_as_under_hf(
    task: str, dense: dict[str, Any], full: dict[str, Any]
) -> None:
    theirs, ours = ({doc["doc_id"]: doc for doc in run["samples"][task]} for run in (dense, full))
    assert set(ours) == set(theirs) == {0, 1}
    for number, doc in theirs.items():
        other = ours[number]
        assert other["prompt_hash"] == doc["prompt_hash"]
        if isinstance(doc["filtered_resps"][0], str):
            assert other["filtered_resps"] == doc["filtered_resps"]
        assert list(numbers(other["filtered_resps"])) == pytest.approx(list(numbers(doc["filtered_resps"])), rel=1e-5)
        for metric in doc["metrics"]:
            assert list(numbers(other[metric])) == pytest.approx(list(numbers(doc[metric])), rel=1e-5)
    for metric, score in dense["results"][task].items():
        if isinstance(score, float):
            assert full["results"][task][metric] == pytest.approx(score, rel=1e-5)


def test_below_it_every_task_is_sparse_and_scores_otherwise(
    checkpoint: Path, profile: Path, dense: dict[str, Any]
) -> None:
    lm = FasaHFLM(str(checkpoint), profile=str(profile), n_fac=16, n_tip=2, device="cpu", batch_size=4)
    results = evaluate(lm, checkpoint)
    account = results["config"]["fasa"]
    assert set(account["tasks"]) == set(TASKS)
    assert all(run["sparse_queries"] > 0 and run["kv_share"] < 0.2 for run in account["tasks"].values())
    assert all(run["requests"] == 2 for run in account["tasks"].values())
    assert not any("NO SPARSE QUERY" in warning for warning in account["warnings"])
    same = [
        task
        for task in TASKS
        if [doc["filtered_resps"] for doc in results["samples"][task]]
        == [doc["filtered_resps"] for doc in dense["samples"][task]]
    ]
    assert same == []
