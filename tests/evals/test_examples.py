"""evals/examples: each script runs as pasted, from the checkout's folder, with the reference model.

`simple_evaluate.py` runs in test_evaluate_page.py.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "evals" / "examples"
SPARSE_LAYERS = 3  # of the reference model's four
HERE = {"generate", "batch", "decode_loop", "own_scorer", "own_estimator", "attention", "tensor_parallel"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run an example by its name; its global names."""
    monkeypatch.chdir(ROOT)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == HERE | {"simple_evaluate"}


@pytest.mark.slow
def test_a_stock_model_generates_sparsely(run: Callable[[str], dict[str, Any]]) -> None:
    ran = run("generate")
    stats, written = ran["fasa"].stats, ran["answer"].shape[1] - ran["prompt"].input_ids.shape[1]
    assert written == 50
    assert stats.sparse_queries == SPARSE_LAYERS * (written - 1)
    assert 0 < stats.kv_share < 0.05  # 128 of some 3900 keys


@pytest.mark.slow
def test_requests_are_answered_in_one_batch(
    run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run("batch")
    written = [len(answer.generated_tokens) for answer in ran["answers"].values()]
    assert written == [20] * 3
    assert ran["fasa"].stats.sparse_queries == SPARSE_LAYERS * (sum(written) - len(written))
    assert "FasaStats" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_divided_over_two_processes_generates_sparsely() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(EXAMPLES / "tensor_parallel.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"sparse_queries={SPARSE_LAYERS * 29}" in done.stdout
    assert done.stdout.count("FasaStats") == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_the_decoding_loop_runs(run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    ran = run("decode_loop")
    assert ran["fasa"].stats.sparse_queries == SPARSE_LAYERS * (ran["NEW_TOKENS"] - 1)
    assert len(ran["tokens"]) == ran["NEW_TOKENS"]
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_scorer_of_ones_own_runs_beside_fasa(
    run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("own_scorer")
    said = capsys.readouterr().out
    nats = {name: float(value) for name, value in re.findall(r"(.+): ([\d.]+) nats a token", said)}
    assert list(nats) == ["FASA", "largest keys"]
    assert nats["FASA"] < nats["largest keys"]  # which does not look at the query
    assert said.count(f"sparse_queries={SPARSE_LAYERS * 128}") == 2


@pytest.mark.slow
def test_an_estimator_of_ones_own_prefills(
    run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("own_estimator")
    said = capsys.readouterr().out
    nats = {name: float(value) for name, value in re.findall(r"(.+): ([\d.]+) nats a token", said)}
    assert list(nats) == ["dense", "pooled", "by means"]
    assert nats["dense"] < min(nats["pooled"], nats["by means"]) < nats["dense"] + 0.2
    assert said.count("36% of the blocks") == 2


def test_the_method_runs_without_a_model(run: Callable[[str], dict[str, Any]]) -> None:
    ran = run("attention")
    sparse, dense = ran["sparse"], ran["everything"]
    assert sparse.shape == dense.shape == (1, 8, 1, 64)
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_the_readme_shows_the_scorer_of_the_example() -> None:
    shown = re.search(r"```python\n(class LargestKeys.*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    assert f"\n\n\n{shown[1]}\n\n    def reads" in (EXAMPLES / "own_scorer.py").read_text()
