"""Runs are compared document by document, on the same prompts or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentences import raises_sentence

from fasa_flex.cli import main
from fasa_flex.report.compare import Run, compare, curve_rows, table, warnings

STAMP = "2026-01-02T03-04-05.678901"


def write(
    folder: Path,
    values: list[float],
    budget: int | None = None,
    prompts: list[str] | None = None,
    task: str = "needle",
    metric: str = "exact_match",
    said: tuple[str, ...] = (),
) -> Path:
    """A run's folder, as lm-eval 0.4.13 writes it."""
    prompts = prompts or [f"prompt {number}" for number in range(len(values))]
    account = {
        "method": "fasa",
        "n_fac": budget,
        "profile": "abc",
        "warnings": list(said),
        "tasks": {task: {"sparse_queries": 7, "kv_bytes_share": 0.155}},
    }
    inner = folder / "org__model"
    inner.mkdir(parents=True)
    results = {
        "results": {task: {"alias": task, f"{metric},none": float(np.mean(values))}},
        "configs": {task: {"task": task}},
        "config": {"model": "hf"} if budget is None else {"model": "fasa_hf", "fasa": account},
    }
    (inner / f"results_{STAMP}.json").write_text(json.dumps(results))
    lines = [
        {
            "doc_id": number,
            "prompt_hash": prompt,
            "target_hash": "t",
            "filter": "none",
            "metrics": [metric, "4096"],
            metric: value,
            "4096": -1.0,
        }
        for number, (prompt, value) in enumerate(zip(prompts, values, strict=True))
    ]
    (inner / f"samples_{task}_{STAMP}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5  # which documents are hard decides nearly everything
    dense = (~hard).astype(float)
    sparse = dense.copy()
    sparse[np.flatnonzero(dense)[:10]] = 0
    runs = [Run.load(write(tmp_path / "a", dense.tolist())), Run.load(write(tmp_path / "b", sparse.tolist(), 64))]
    first, second = compare(runs)
    assert (first.score, first.difference, first.difference_interval) == (dense.mean(), None, None)
    assert second.difference == pytest.approx(-0.05)
    low, high = second.difference_interval or (0, 0)
    # ten of 200 documents lost: the exact binomial 95 % interval is 2.4 to 9.0 %
    assert -0.092 < low < -0.07
    assert -0.033 < high < -0.015
    assert second.interval[1] - second.interval[0] > 1.7 * (high - low)  # a difference is known better than a score
    assert compare(runs) == [first, second]  # the generator is private and seeded


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    runs = [Run.load(write(tmp_path / name, [0.0, 1.0, 1.0], budget)) for name, budget in (("a", None), ("b", 16))]
    row = compare(runs)[1]
    assert (row.difference, row.difference_interval) == (0.0, (0.0, 0.0))


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    one = Run.load(write(tmp_path / "a", [1.0, 1.0, 0.0]))
    other = Run.load(write(tmp_path / "b", [1.0, 1.0, 0.0], 64, prompts=["prompt 0", "another", "prompt 2"]))
    with pytest.raises(ValueError, match=r"1 of 3 prompts of needle differ .* the first in document 1; run both"):
        compare([one, other])
    fewer = Run.load(write(tmp_path / "c", [1.0, 1.0], 64))
    with pytest.raises(ValueError, match="1 of 3 prompts of needle differ"):
        compare([one, fewer])


def test_runs_without_a_task_in_common_are_refused(tmp_path: Path) -> None:
    runs = [Run.load(write(tmp_path / name, [1.0], task=name)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="no task and metric in common"):
        compare(runs)
    with pytest.raises(ValueError, match="needs at least two runs, got 1"):
        compare(runs[:1])


def test_folders_of_several_runs_or_without_samples_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "both" / "a", [1.0])
    write(tmp_path / "both" / "b", [1.0])
    with pytest.raises(ValueError, match="holds 2 results of lm-eval, not one"):
        Run.load(tmp_path / "both")
    with pytest.raises(ValueError, match="holds 0 results"):
        Run.load(tmp_path / "nothing")
    bare = write(tmp_path / "bare", [1.0])
    next(bare.rglob("samples_*")).unlink()
    with pytest.raises(ValueError, match="no samples of needle; run lm_eval with --log_samples"):
        Run.load(bare)


def test_perplexity_is_compared_in_nats_and_rulers_other_lengths_are_left_out(tmp_path: Path) -> None:
    pairs: list[Any] = [[-20.0, 10], [-60.0, 20]]
    folder = tmp_path / "a"
    write(folder, [0.0, 0.0], metric="word_perplexity")
    path = next(folder.rglob("samples_*"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "\n".join(json.dumps({**line, "word_perplexity": pair}) for line, pair in zip(lines, pairs, strict=True))
    )
    assert Run.load(folder).scores == {("needle", "word_perplexity [nats per unit]"): {"0": 2.0, "1": 3.0}}


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    dense = write(tmp_path / "dense", [1.0, 1.0, 0.0, 1.0])
    arms = [write(tmp_path / str(n), [1.0, 0.0, 0.0, n / 64], n, said=("NO SPARSE QUERY",)) for n in (32, 64)]
    picture = tmp_path / "curve.png"
    assert main(["compare", str(dense), *map(str, arms), "--plot", str(picture), "--draws", "200"]) == 0
    out, err = capsys.readouterr()
    assert "| needle | exact_match | dense | - | 0.75 |" in out
    assert "| needle | exact_match | fasa | 64 | 0.5 |" in out
    assert "| -0.25 |" in out
    assert "| 15.5% | 7 | 4 |" in out
    assert "warning: fasa, 32: NO SPARSE QUERY" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_drawn_rows_are_those_of_the_table(tmp_path: Path) -> None:
    runs = [Run.load(write(tmp_path / str(n), [1.0, 0.0], n)) for n in (None, 32, 64)]
    rows = compare(runs, draws=100)
    assert [row["budget"] for row in curve_rows(rows)] == [None, 32, 64]
    assert {row["task"] for row in curve_rows(rows)} == {"needle"}
    several = [replace(row, metric=metric) for row in rows for metric in ("acc", "nll")]
    assert {row["task"] for row in curve_rows(several)} == {"needle, acc", "needle, nll"}  # a panel each
    assert len(table(rows).splitlines()) == 2 + 3
    assert warnings(runs) == []


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Run:
    """The run with every sample changed, written as lm-eval does: without escapes."""
    path = next(folder.rglob("samples_*"))
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    return Run.load(folder)


def test_pairs_of_classes_are_no_scores(tmp_path: Path) -> None:
    """As lm-eval logs them for F1: gold and predicted."""
    folder = write(tmp_path / "a", [1.0, 0.0])
    run = rewritten(folder, lambda line: {**line, "metrics": ["exact_match", "f1"], "f1": [1, line["doc_id"]]})
    assert set(run.scores) == {("needle", "exact_match")}


def test_documents_may_hold_any_character(tmp_path: Path) -> None:
    run = rewritten(write(tmp_path / "a", [1.0, 0.0]), lambda line: {**line, "doc": "one\u2028two\u2029three\x85four"})
    assert run.scores == {("needle", "exact_match"): {"0": 1.0, "1": 0.0}}


def test_scores_of_other_documents_are_refused(tmp_path: Path) -> None:
    def drop(line: dict[str, Any]) -> dict[str, Any]:
        return {**line, "metrics": [] if line["doc_id"] == 1 else line["metrics"]}

    whole = Run.load(write(tmp_path / "a", [1.0, 0.0, 1.0]))
    part = rewritten(write(tmp_path / "b", [1.0, 0.0, 1.0], 64), drop)
    for runs in ([whole, part], [part, whole]):
        with pytest.raises(ValueError, match="exact_match of needle for different documents, 1 among them"):
            compare(runs)


def test_settings_and_models_that_differ_are_told(tmp_path: Path) -> None:
    runs = [Run.load(write(tmp_path / name, [1.0], 64)) for name in ("a", "b")]
    assert warnings(runs) == []
    other = replace(runs[1], account={**runs[1].account, "n_recent": 8, "n_tip": 16}, pretrained="B")
    said = warnings([replace(runs[0], pretrained="A"), other])
    assert said[0] == "the runs are of different models: A, B"
    assert said[1].endswith("are both fasa, 64 and differ in n_recent, n_tip")


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [1.0])
    path = next(folder.rglob("results_*"))
    for content, reason in (('{"configs": {', "is no JSON of lm-eval"), ("{}", "is no result of lm-eval")):
        path.write_text(content)
        with raises_sentence(ValueError, match=f"{path.name} {reason}"):
            Run.load(folder)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        compare([Run.load(write(tmp_path / name, [1.0])) for name in ("b", "c")], draws=0)
