"""The README shows what the committed results say, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from ways import support_table

from evals.bench.tables import TABLES
from evals.marked import block
from evals.quality import real_tables
from fasa_flex import FasaConfig, enable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_committed_results() -> None:
    """`python -m evals.quality.demo --commit-results` writes it."""
    record = json.loads((ROOT / "evals" / "results" / "demo.json").read_text())
    assert block(README, "demo table") == record["table"]


def test_the_support_table_is_the_matrix_of_the_tests() -> None:
    """`python tests/ways.py` prints it."""
    assert block(README, "support table") == support_table()


@pytest.mark.parametrize("table", real_tables.TABLES)
def test_the_tables_of_the_real_model_are_those_of_the_committed_results(table: str) -> None:
    """`python -m evals.quality.real_tables` writes them."""
    assert block(README, table) == real_tables.TABLES[table]()


@pytest.mark.parametrize(("readme", "table"), [(readme, name) for readme in TABLES for name in TABLES[readme]])
def test_the_tables_of_speed_are_those_of_the_committed_results(readme: Path, table: str) -> None:
    """`python -m evals.bench.tables` writes them."""
    assert block(readme.read_text(), table) == TABLES[readme][table]()


def test_the_scorer_in_the_readme_runs(llama: PreTrainedModel) -> None:
    """A rival method in a few lines: the keys of largest norm."""
    code = re.search(r"```python\n(class LargestKeys.*?)\n\nenable", README, flags=re.DOTALL)
    assert code is not None
    names: dict[str, type] = {}
    exec(code[1], names)
    with enable(llama, None, FasaConfig(n_fac=4), scorer=lambda layer: names["LargestKeys"]()) as fasa:
        llama.generate(torch.arange(1, 21)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert fasa.stats.sparse_queries == 4


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
