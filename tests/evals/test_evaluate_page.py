"""evals/evaluate.md: its tables are those of the code and of the committed results, and its example runs."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.marked import block
from evals.quality import calibration_size, options
from fasa_flex.lm_eval.arguments import OPTIONS
from fasa_flex.lm_eval.model import FasaHFLM

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "evals" / "evaluate.md").read_text()
TABLES = {**options.TABLES, **calibration_size.TABLES}


@pytest.mark.parametrize(("name", "made"), TABLES.items(), ids=list(TABLES))
def test_the_page_says_what_the_code_says(name: str, made: Callable[[], str]) -> None:
    """`python -m evals.quality.options` and `calibration_size` write it."""
    assert block(PAGE, name) == made()


def test_every_option_is_in_the_table() -> None:
    """With values and a meaning; what decides an option's default is the code."""
    signature = inspect.signature(FasaHFLM.__init__).parameters
    own = {*signature, *OPTIONS} - {"self", "options"}
    rows = {name: rest for name, *rest in options.rows()}
    assert rows.keys() == own
    for name, (default, values, meaning) in rows.items():
        assert all((default, values, meaning)), name
    assert {name for name, (default, *_) in rows.items() if default == "required"} == {"pretrained"}
    assert rows["dense_layers"][:2] == ["`0`", "`0`, `0+1`, `none`; from Python a list, too"]
    assert "`none`" in rows["packed_dtype"][1]
    assert "fastest" not in rows["backend"][1]  # which fasa_hf refuses


@pytest.mark.slow
def test_the_example_runs_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = runpy.run_path(str(options.EXAMPLE))
    assert set(names["results"]["results"]) == set(names["TASKS"])
    said = capsys.readouterr().out
    assert "fasa_ppl_position: " in said
    assert "sparse queries read 1" in said  # 13 and 14 % of the bytes
    assert list((tmp_path / "fasa_flex" / "profiles").iterdir())
