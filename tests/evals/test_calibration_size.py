"""How many calibration texts: the script on a tiny random model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.quality import calibration_size


def test_samples_come_from_parts_of_their_own() -> None:
    ids = torch.arange(1000)
    first, second = calibration_size.samples(ids, 2, 300, draw=0)
    assert len(first) == len(second) == 300
    assert first[-1] < 500 <= second[0]
    assert not torch.equal(first, calibration_size.samples(ids, 2, 300, draw=1)[0])


def test_a_run_measures_what_its_file_does_not_hold(
    chatting: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "size.json"
    given = {"lengths": 128, "draws": 2, "large": 3, "windows": 2, "window": 300, "tail": 20, "budget": 24, "out": out}
    words = ["calibration_size.py", *(f"--{name}={value}" for name, value in given.items()), "--counts", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "2"])
    monkeypatch.setattr(calibration_size, "load_smollm2", lambda device: chatting)
    calibration_size.main()
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == {"large", *(f"{n} x 128, draw {draw}" for n in (1, 2) for draw in (0, 1))}
    rows = {name: part["rows"][0] for name, part in parts.items()}
    assert rows["large"]["shared"] == 1
    assert all(0 < row["shared"] < 1 and len(set(row["over_dense"])) == 2 for row in list(rows.values())[1:])
    lines = calibration_size.table(out).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 2", "| 3"]
    assert "2 windows of 300 tokens" in calibration_size.setting(out)
    monkeypatch.setattr(calibration_size, "shared_chunks", lambda *profiles: 0.123)
    monkeypatch.setattr(sys, "argv", [*words, "3"])
    calibration_size.main()
    more = {name: part["rows"][0]["shared"] for name, part in json.loads(out.read_text())["parts"].items()}
    assert {name for name, shared in more.items() if shared == 0.123} == {f"3 x 128, draw {draw}" for draw in (0, 1)}
