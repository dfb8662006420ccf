"""The README shows what the committed results say, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from ways import support_table

from fasa_flex import FasaConfig, enable
from fasa_flex.bench.report import side_by_side, summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_committed_results() -> None:
    """`python -m evals.quality.demo --table` prints it."""
    shown = re.search(r"<!-- demo table -->\n(.*?)\n<!-- /demo table -->", README, flags=re.DOTALL)
    assert shown is not None
    record = json.loads((ROOT / "evals" / "results" / "demo.json").read_text())
    assert shown[1] == record["table"]


def test_the_support_table_is_the_matrix_of_the_tests() -> None:
    """`python tests/ways.py` prints it."""
    shown = re.search(r"<!-- support table -->\n(.*?)\n<!-- /support table -->", README, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == support_table()


SPEED_TABLES = {
    "speed cuda": "bench_op_cuda",
    "step cuda": "bench_step_cuda",
    "step compiled cuda": "bench_step_cuda_compiled",
    "speed cpu": "bench_op_cpu",
    "flex cpu": "bench_op_cpu_flex",
    "step cpu": "bench_step_cpu",
}


@pytest.mark.parametrize(("table", "file"), SPEED_TABLES.items())
def test_the_speed_tables_are_those_of_the_committed_results(table: str, file: str) -> None:
    """`fasa_flex.bench.report.summary` of the rows."""
    shown = re.search(rf"<!-- {table} -->\n(.*?)\n<!-- /{table} -->", README, flags=re.DOTALL)
    assert shown is not None
    rows = json.loads((ROOT / "evals" / "results" / f"{file}.json").read_text())["rows"]
    assert shown[1] == summary(rows)


@pytest.mark.parametrize(
    ("device", "third", "rival"),
    [
        ("cuda", "max, int8 packed keys", "FASA-C triton"),
        ("cpu", "softmax, int8 packed keys", "FASA-C gather, compiled"),
    ],
)
def test_the_tables_of_rankings_are_those_of_the_committed_results(device: str, third: str, rival: str) -> None:
    """`fasa_flex.bench.report.side_by_side` of three files."""
    shown = re.search(rf"<!-- rankings {device} -->\n(.*?)\n<!-- /rankings {device} -->", README, flags=re.DOTALL)
    assert shown is not None
    files = {"softmax (default)": device, "max": f"{device}_max", third: f"{device}_int8"}
    results = ROOT / "evals" / "results"
    runs = {name: json.loads((results / f"bench_op_{file}.json").read_text())["rows"] for name, file in files.items()}
    assert shown[1] == side_by_side(runs, rival)


def test_the_scorer_in_the_readme_runs(llama: PreTrainedModel) -> None:
    """A rival method in a few lines: the keys of largest norm."""
    code = re.search(r"```python\n(class LargestKeys.*?)\n\nenable", README, flags=re.DOTALL)
    assert code is not None
    names: dict[str, type] = {}
    exec(code[1], names)
    with enable(llama, None, FasaConfig(n_fac=4), scorer=lambda layer: names["LargestKeys"]()) as fasa:
        llama.generate(torch.arange(1, 21)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert fasa.stats.sparse_queries == 4
