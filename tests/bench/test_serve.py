"""Part serve of the benchmark: its trace, and a run on the smallest shape; never its speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fasa_flex.bench import serve
from fasa_flex.bench.__main__ import main
from fasa_flex.bench.serve import _decoding, _summary, trace
from fasa_flex.bench.shapes import SHAPES


def test_the_trace_mixes_lengths_and_shares_a_prefix() -> None:
    asked = trace(1000, 6, 100, vocabulary=50)
    lengths = [len(prompt) for prompt, _ in asked]
    assert lengths == [500, 600, 700, 800, 900, 1000]
    assert [new for _, new in asked] == [100, 90, 80, 70, 60, 50]
    shared = [prompt for prompt, _ in asked[1::2]]
    assert all(prompt[:250] == shared[0][:250] for prompt in shared)
    assert asked[0][0][:250] != shared[0][:250]
    assert asked == trace(1000, 6, 100, vocabulary=50)


def test_the_summary_counts_while_all_requests_decode() -> None:
    times = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0, 6.0]]
    assert _decoding(times) == (2 + 2) / 2  # from 2 to 4 seconds
    assert _decoding([[1.0, 2.0], [3.0, 4.0]]) == 3 / 3  # no such time: from 1 to 4
    summary = _summary([{"seconds": 8.0, "times": times, "peak_bytes": 3}])
    assert summary["requests_per_s"] == 2 / 8
    assert summary["tokens_per_s"] == 9 / 8
    assert summary["first_token_s"]["median"] == 1.5
    assert summary["token_s"] == {"median": 1.0, "p95": 1.0}
    assert summary["peak_bytes"] == 3


def test_the_bound_reads_weights_keys_and_values_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, device = SHAPES["tiny"], torch.device("cpu")
    model = shape.model(2, 64, torch.float32, device)
    weights = 4 * sum(each.numel() for each in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= 4 * shape.vocabulary * model.config.hidden_size
    monkeypatch.setattr(serve, "bandwidth", lambda device: {"copy": 3.0})
    bound = serve._dense_bound(shape, 2, model, [([1] * 10, 4), ([1] * 20, 2)], device)
    states = (10 + 2 + 20 + 1) * 2 * shape.kv_heads * 2 * shape.head_dim * 4
    assert bound == pytest.approx(2 * 3e9 / (weights + states))


@pytest.mark.slow
def test_the_smallest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--part", "serve", "--device", "cpu", "--shapes", "tiny", "--contexts", "200", "--batches", "3"]
    assert main([*options, "--n-fac", "32", "--new-tokens", "6", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "bench_serve_cpu.json").read_text())["rows"]
    assert row["prompt_tokens"] == [100, 150, 200]
    dense, fasa = row["rivals"]
    assert (dense["name"], fasa["name"]) == ("dense", "FASA")
    assert "sparse_queries" not in dense
    assert fasa["sparse_queries"] == (sum(row["new_tokens"]) - 3) * (2 - len(row["config"]["dense_layers"]))
    out = capsys.readouterr().out
    assert "| tiny | 2 | 3 | 200 | FASA |" in out
    assert f"| any dense attention, at most | - | - | {row['dense_bound_tokens_per_s']:.3g} | - | - | - |" in out
