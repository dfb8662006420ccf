"""Scripts under `evals` that only a GPU runs import names that exist."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of the project, and the names that a file imports from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fasa_flex"):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("folder", ["bench", "quality", "reference_model", "examples"])
def test_names_that_scripts_import_exist(folder: str) -> None:
    wanted = {pair for path in (EVALS / folder).rglob("*.py") for pair in imported(path)}
    assert wanted
    missing = []
    for module, name in sorted(wanted):
        if "triton" in module and find_spec("triton") is None:
            continue  # it is installed with CUDA builds of torch only
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert not missing
