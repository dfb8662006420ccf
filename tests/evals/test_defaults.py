"""The comparison of the defaults with the former ones, in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from evals.quality import arms, defaults
from fasa_flex import FasaConfig


def test_the_former_settings_are_said_in_full() -> None:
    former = FasaConfig(n_fac=64, **arms.FORMER)
    changed = {name for name, value in former.to_dict().items() if value != FasaConfig(n_fac=64).to_dict()[name]}
    assert changed == arms.FORMER.keys()


def test_worse_is_below_zero_whatever_is_measured() -> None:
    figures = {
        "dense": 1.0,
        **{f"{arm}, {b}": 0.5 + (arm == "default") for arm in ("former", "default") for b in defaults.BUDGETS},
    }
    by_task = {row["task"]: row["better"] for row in defaults.summary({"needle": [figures], "text": [figures]})}
    assert by_task == {"needle": [1.0, 1.0, 1.0], "text": [-1.0, -1.0, -1.0]}


@pytest.mark.slow
def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["defaults.py", "--quick", "--out", str(tmp_path)])
    defaults.main()
    parts = json.loads((tmp_path / "defaults.json").read_text())["parts"]
    rows = parts["reference_model: summary"]["rows"]
    assert {(row["task"], row["budget"]) for row in rows} == {(t, b) for t in defaults.TASKS for b in defaults.BUDGETS}
    (text,) = parts["reference_model: text, 0 to 0"]["rows"]
    assert text["dense"] < text["default, 256"] < text["default, 32"] < text["former, 32"]
    monkeypatch.setattr(defaults.Trial, "measured", None)
    defaults.main()
    assert json.loads((tmp_path / "defaults.json").read_text())["parts"] == parts
