"""The benchmarks of decoding as `generate` does it: what they run, in which order, and what they make of the times."""

from __future__ import annotations

import json
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.bench import generate, growing, tensor_parallel
from evals.bench.tables import rows_of
from fasa_flex.bench.shapes import Shape
from fasa_flex.model.decode_cache import BREAK_EVEN

SHAPE = Shape("tiny", 2, 64, 4, 2, 16, 32, 50)
CONTEXT = 300  # more than the budget of 256


def test_every_way_decodes_on_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "STEPS", 3)
    monkeypatch.setattr(growing, "WARM", 1)
    caches: list[Any] = []
    filled = growing.filled
    monkeypatch.setattr(growing, "filled", lambda *of: caches.append(filled(*of)) or caches[-1])
    model = SHAPE.model(2, CONTEXT + 4, torch.float32, torch.device("cpu")).eval()
    row = growing.measure(model, SHAPE, CONTEXT)
    assert [(way["name"], way["sparse"]) for way in row["ways"]] == [
        ("dense", False),
        ("FASA auto", True),
        ("FASA fastest", False),  # so small a cache is below the crossover
    ]
    assert all(way["seconds"] > 0 and way["steps"] == 3 for way in row["ways"])
    assert [cache.get_seq_length() for cache in caches] == [CONTEXT + 4] * 3
    assert (row["context"], row["layers"], row["shape"]) == (CONTEXT, 2, "tiny")


def test_a_tokens_time_is_a_long_answers_less_a_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a token moves by 2 s, a prompt by 30, and the first answer of a length by 100 more."""
    clock, asked = [0.0], []

    class Model:
        device = torch.device("cpu")

        def generate(self, prompt: torch.Tensor, max_new_tokens: int, min_new_tokens: int, **options: Any) -> Any:
            assert min_new_tokens == max_new_tokens
            assert {name: options[name] for name in ("do_sample", "cache_implementation")} == {
                "do_sample": False,
                "cache_implementation": "static",
            }
            clock[0] += 30 + 2 * max_new_tokens + 100 * (max_new_tokens not in asked)
            asked.append(max_new_tokens)
            return prompt

    monkeypatch.setattr(generate.time, "perf_counter", lambda: clock[0])
    model: Any = Model()
    seconds = generate.seconds_of_answers(model, torch.ones(1, 1), generate.CACHES["static"])
    assert asked == [generate.LONG, generate.LONG, generate.SHORT, generate.SHORT]
    assert generate.seconds_a_token(seconds) == 2.0
    assert seconds[0] - seconds[1] == 100


def test_compiling_has_paid_when_the_tokens_have_saved_its_time() -> None:
    rows = [
        {"name": "FASA", "cache": "growing", "seconds": 0.011, "compile_seconds": 0.2},
        {"name": "FASA", "cache": "static", "seconds": 0.003, "compile_seconds": 16.0},
        {"name": "dense", "cache": "growing", "seconds": 0.007, "compile_seconds": 0.2},
        {"name": "dense", "cache": "static", "seconds": 0.008, "compile_seconds": 16.0},
    ]
    assert generate.paid_after(rows, "FASA", "static") == pytest.approx(2000)
    assert generate.paid_after(rows, "dense", "static") is None


def test_compiling_has_paid_by_then_in_the_committed_run() -> None:
    """That run noted no time of compiling: its static rows came so many seconds after the growing ones."""
    rows = {(row["name"], row["cache"]): row for row in rows_of("generate_cuda")}
    begun, ended = (datetime.fromisoformat(rows["FASA auto", cache]["date"]) for cache in ("growing", "static"))
    static = [row["seconds"] for (_, cache), row in rows.items() if cache == "static"]
    decoded = (1 + generate.REPEATS) * 2 * (generate.LONG + generate.SHORT) * sum(static)
    compiling = ((ended - begun).total_seconds() - decoded) / len(static)
    saved = rows["FASA auto", "growing"]["seconds"] - rows["FASA auto", "static"]["seconds"]
    assert compiling == pytest.approx(18.4, abs=0.05)
    assert pytest.approx(compiling / saved, rel=0.01) == BREAK_EVEN


def test_prompts_of_other_lengths_get_as_many_tokens_as_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on a CPU, where the plain call's cache grows as well."""
    monkeypatch.setattr(generate, "LONG", 5)
    monkeypatch.setattr(generate, "SHORT", 2)
    model = SHAPE.model(2, CONTEXT, torch.float32, torch.device("cpu")).eval()
    found = generate.other_lengths(model, torch.ones(1, 80, dtype=torch.long))
    assert [(row["context"], row["same_tokens"], len(row["seconds"])) for row in found] == [(20, 5, 2), (40, 5, 2)]


def test_a_rank_measures_every_variant_on_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks add is in tests/test_tensor_parallel.py; here one measures, and leaves its logits to compare."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    options = {"device": "cpu", "shape": "tiny", "layers": 2, "batches": "1", "contexts": str(CONTEXT), "rounds": 2}
    tensor_parallel.measure(Namespace(**options, folder=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / tensor_parallel.ROWS).read_text().splitlines()]
    assert {row["name"] for row in rows} > {"FASA-C gather", "FASA-C fastest", "transformers' SDPA"}
    assert all(row["seconds"] > 0 and row["error"] == 0 and row["ranks"] == 1 for row in rows)
    names = ("SDPA", "grouped SDPA", "FASA-C gather")
    dense, same, sparse = (torch.load(tmp_path / f"1 {CONTEXT} {name}.pt") for name in names)
    torch.testing.assert_close(same, dense)
    assert 0.01 < float((dense - sparse).norm() / dense.norm()) < 0.5


def test_the_table_says_what_more_gpus_and_what_sparse_attention_give() -> None:
    times = {("SDPA", 1): 0.008, ("grouped SDPA", 1): 0.01, ("FASA", 1): 0.004}
    times |= {("SDPA", 2): 0.006, ("grouped SDPA", 2): 0.005, ("FASA", 2): 0.002}
    rows = [{"batch": 8, "context": 99, "name": n, "ranks": r, "seconds": s} for (n, r), s in times.items()]
    lines = tensor_parallel.table(rows).splitlines()
    assert "| 8 | 99 | FASA | 1 | 4.00 | 1.00x | 2.00x |" in lines
    assert "| 8 | 99 | FASA | 2 | 2.00 | 2.00x | 2.50x |" in lines
    assert "| 8 | 99 | grouped SDPA | 2 | 5.00 | 2.00x | 1.00x |" in lines
