"""What the launcher adds to the command line."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
from lm_eval import tasks
from lm_eval.config.evaluate_config import EvaluatorConfig

from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.__main__ import with_tasks

ADDED = ["--include_path", str(TASKS_PATH)]


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--model", "hf"], [*ADDED, "--model", "hf"]),
        (["run", "--model", "hf"], ["run", *ADDED, "--model", "hf"]),
        (["ls", "tasks"], ["ls", "tasks", *ADDED]),
        (["validate", "--tasks", "x"], ["validate", *ADDED, "--tasks", "x"]),
        (["--include_path", "mine", "--model", "hf"], ["--include_path", "mine", "--model", "hf"]),
        (["--include_path=mine"], ["--include_path=mine"]),
        ([], []),
    ],
)
def test_packaged_tasks_are_included(given: list[str], passed: list[str]) -> None:
    assert with_tasks(given) == passed


@pytest.mark.parametrize(
    ("asked", "named"),
    [("fasa_needle", "(fasa_needle)"), ("fasa_recall,fasa_ppl,hellaswag", "(fasa_ppl, fasa_recall)")],
)
def test_the_error_for_an_unknown_packaged_task_leads_to_it(
    asked: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval has no registry of folders: the error that ends its process is followed by what to add."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: print(error, file=sys.stderr))
    monkeypatch.delenv("FASA_FLEX_NO_STARTUP", raising=False)
    file = Path(__file__).parents[2] / "fasa_flex" / "startup" / "_fasa_flex_startup.py"
    spec = importlib.util.spec_from_file_location("startup_under_test", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for _ in range(2):  # once is enough
        sys.meta_path[0].find_spec("lm_eval")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="not found") as error:
        EvaluatorConfig(tasks=asked, model="fasa_hf").process_tasks()
    sys.excepthook(ValueError, error.value, None)
    first, hint = capsys.readouterr().err.splitlines()
    assert first == str(error.value)
    assert hint.startswith(f"fasa_flex: lm_eval by itself does not know packaged tasks {named}; add --include_path ")
    assert "python -m fasa_flex.lm_eval --tasks-path" in hint
    sys.excepthook(ValueError, ValueError("Tasks not found: hellaswag"), None)
    assert capsys.readouterr().err == "Tasks not found: hellaswag\n"
