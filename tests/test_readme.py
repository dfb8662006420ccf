"""README and pages show what the committed results say, and the README's example runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep import table
from ways import support_table

from evals.bench.tables import TABLES
from evals.marked import block
from evals.quality import no_rope, real_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ROOT / "evals" / "docs"


def test_the_table_is_that_of_the_committed_results() -> None:
    """`python -m evals.quality.demo --commit-results` writes it."""
    record = json.loads((ROOT / "evals" / "results" / "demo.json").read_text())
    assert block((PAGES / "rivals.md").read_text(), "demo table") == record["table"]


def test_the_support_table_is_the_matrix_of_the_tests() -> None:
    """`python tests/ways.py` prints it."""
    assert block((PAGES / "models.md").read_text(), "support table") == support_table()


FILLED = [
    (page, name, made)
    for tables in (real_tables.TABLES, TABLES, table.TABLES, no_rope.TABLES)
    for page in tables
    for name, made in tables[page].items()
]


@pytest.mark.parametrize(("page", "table", "made"), FILLED, ids=[f"{page.stem}: {name}" for page, name, _ in FILLED])
def test_tables_are_those_of_the_committed_results(page: Path, table: str, made: Callable[[], str]) -> None:
    """`python -m evals.quality.real_tables`, `evals.bench.tables` and `tests/sweep/table.py` write them."""
    assert block(page.read_text(), table) == made()


@pytest.mark.slow
def test_the_first_example_runs_as_pasted() -> None:
    """With the reference model's folder in place of the name on the Hub."""
    code = re.search(r"```python\n(from pydoc_data.*?)```", README, flags=re.DOTALL)
    assert code is not None
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code[1]
    names: dict[str, Any] = {}
    model = ROOT / "evals" / "reference_model"
    exec(code[1].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)), names)
    stats = names["fasa"].stats
    assert stats.sparse_queries == 49 * (names["model"].config.num_hidden_layers - 1)
    assert 0 < stats.kv_share < 0.2


def test_no_class_of_the_sweep_ends_in_a_raw_error() -> None:
    classes = table.committed()["classes"]
    assert not [name for name, record in classes.items() if record["status"] == "raw"]
    works = [record for record in classes.values() if record["status"] == "works"]
    assert len({record["family"] for record in works}) >= 60
    assert len({record["family"] for record in works if table.is_hybrid(record)}) >= 8
