"""evals/bench/decode.py, which the README shows as a whole decoding loop, runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_the_decoding_loop_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["decode.py", str(EVALS / "reference_model")])
    ran = runpy.run_path(str(EVALS / "bench" / "decode.py"))
    steps = ran["NEW_TOKENS"] - 1
    assert ran["fasa"].stats.sparse_queries == 3 * steps  # three of the four layers
    assert "tok/s" in capsys.readouterr().out
