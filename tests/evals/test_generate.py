"""The benchmarks of decoding as `generate` does it: what they run, in which order, and what they make of the times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evals.bench import generate, growing
from fasa_flex.bench.shapes import Shape

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

        def generate(self, prompt: torch.Tensor, max_new_tokens: int, min_new_tokens: int, **options: Any) -> None:
            assert min_new_tokens == max_new_tokens
            assert options == {"do_sample": False, "cache_implementation": "static"}
            clock[0] += 30 + 2 * max_new_tokens + 100 * (max_new_tokens not in asked)
            asked.append(max_new_tokens)

    monkeypatch.setattr(generate.time, "perf_counter", lambda: clock[0])
    model: Any = Model()
    assert generate.seconds_a_token(model, torch.ones(1, 1), generate.CACHES["static"]) == 2.0
    assert asked == [generate.LONG, generate.LONG, generate.SHORT, generate.SHORT]
