"""What the launcher adds to the command line."""

from __future__ import annotations

import pytest

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
