"""What a benchmark expects from counting bytes, and how it puts rows into words; plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from fasa_flex.bench import report
from fasa_flex.bench.limits import amdahl, attention_reads, crossover, project


@pytest.mark.parametrize(("context", "limit"), [(4096, 5.3), (8192, 6.4), (32768, 7.5), (1 << 30, 8.0)])
def test_the_byte_limit_is_the_papers(context: int, limit: float) -> None:
    """1 / (n_tip / d + n_fac / t) with 16 chunks of 64 and 256 tokens."""
    reads = attention_reads(context, 1, 8, 128, 16, 256, itemsize=2)
    assert reads.limit == pytest.approx(1 / (16 / 128 + 256 / context), rel=1e-6)
    assert reads.limit == pytest.approx(limit, abs=0.05)


def test_bytes_of_a_call_counted_by_hand() -> None:
    reads = attention_reads(context=100, batch=3, kv_heads=2, head_dim=16, n_tip=2, n_fac=10, itemsize=4)
    assert reads.dense == 3 * 2 * 100 * 2 * 16 * 4
    assert reads.sparse == 3 * 2 * (100 * 2 * 2 * 4 + 10 * 2 * 16 * 4)


def test_packed_keys_count_in_their_own_bytes_with_their_scales() -> None:
    same, packed = (attention_reads(1000, 1, 1, 64, 8, 10, 4, token) for token in (None, 16 + 4))
    assert same.sparse - packed.sparse == 1000 * (2 * 8 * 4 - 20)


def test_a_budget_of_the_whole_context_reads_what_dense_reads() -> None:
    assert attention_reads(64, 1, 1, 16, 2, 256, 4).limit == 1


def test_amdahl() -> None:
    assert amdahl(step=10, attention=8, limit=4) == pytest.approx(10 / (2 + 2))
    assert amdahl(step=10, attention=8, limit=4, sparse_share=0.5) == pytest.approx(10 / (2 + 4 + 1))
    assert amdahl(step=10, attention=12, limit=4) == pytest.approx(4)  # measured alone it can take longer


@pytest.mark.parametrize(
    ("speedups", "context", "how"),
    [
        ([(1024, 0.5), (4096, 2.0)], 2048, "interpolated"),
        ([(4096, 2.0), (1024, 0.5), (512, 1.5)], 2048, "interpolated"),  # a lucky short one does not count
        ([(1024, 1.5), (4096, 2.0)], None, "below the smallest context measured (1024)"),
        ([(1024, 0.5), (4096, 0.9)], None, "above the largest context measured (4096)"),
    ],
)
def test_crossover(speedups: list[tuple[int, float]], context: int | None, how: str) -> None:
    found = crossover(speedups)
    assert (found.context, found.how) == (context, how)


def test_a_projection_to_full_depth() -> None:
    head, dense, sparse = 1.0, 1 + 2 * 3.0, 1 + 2 * 1.0
    found = project(sparse, dense, head, batch=4, layers=(2, 10), sparse=True)
    assert found is not None
    assert found["seconds"] == 1 + 9 * 1 + 3  # layer 0 stays dense
    assert found["speedup"] == pytest.approx((1 + 10 * 3) / 13)
    assert found["tokens_per_s"] == pytest.approx(4 / 13)
    assert project(sparse, dense, head, batch=4, layers=(10, 10), sparse=True) is None


def test_words_for_crossovers() -> None:
    found = [
        {"shape": "s", "batch": 1, "name": "FASA", "context": 2048, "how": "interpolated"},
        {"shape": "s", "batch": 8, "name": "FASA", "context": None, "how": "above the largest context measured (64)"},
    ]
    first, second = report.sentences(found).splitlines()
    assert first.endswith("from 2048 tokens on (interpolated)")
    assert second.endswith("at a context above the largest context measured (64)")


def test_side_by_side_names_speed_and_share_of_the_limit() -> None:
    def rows(context: int, speedup: float) -> list[dict[str, Any]]:
        rival = {"name": "FASA", "speedup": speedup, "limit_share": speedup / 8}
        return [{"batch": 1, "context": context, "limit": 8.0, "rivals": [rival, {**rival, "name": "other"}]}]

    lines = report.side_by_side({"a": rows(4096, 2.0), "b": rows(4096, 4.0) + rows(512, 1.0)}, "FASA").splitlines()
    assert lines[0] == "| batch | context | a | b |"
    assert lines[2] == "| 1 | 512 | - | 1.00x (12% of 8.0x) |"
    assert lines[3] == "| 1 | 4k | 2.00x (25% of 8.0x) | 4.00x (50% of 8.0x) |"
