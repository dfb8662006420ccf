"""The check of a model over several devices: what it calls the same, and all of it on one CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from evals.bench import check_spread
from evals.bench.check_cuda import decoding_model
from fasa_flex import FasaConfig

Decoded = tuple[Tensor, Tensor, int]


def decoded(tokens: list[int], shift: float = 0.0, sparse: int = 4) -> Decoded:
    logits = torch.arange(1.0, 13.0).view(3, 2, 2)
    return torch.tensor([tokens, tokens]), logits * (1 + shift), sparse


@pytest.mark.parametrize(
    ("got", "same", "right"),
    [
        (decoded([1, 2, 3]), 3, True),
        (decoded([1, 2, 4]), 2, False),
        (decoded([1, 2, 3], shift=1e-3), 3, False),
        (decoded([1, 2, 3], sparse=0), 3, False),
    ],
    ids=["the same", "another token", "other logits", "dense"],
)
def test_what_is_the_same(got: Decoded, same: int, right: bool) -> None:
    found = check_spread.compare(got, decoded([1, 2, 3]))
    assert (found["same_tokens"], found["ok"]) == (same, right)


@pytest.mark.parametrize("cache", check_spread.CACHES)
def test_it_decodes_sparsely_in_every_place(cache: str) -> None:
    model, profile = decoding_model(torch.device("cpu"))
    decodings: list[Any] = [
        check_spread.decode(placed, device, profile, FasaConfig(n_fac=64), cache, steps=3)
        for placed, device in check_spread.places(model, ["cpu", "cpu"]).values()
    ]
    assert len(decodings) > 1
    assert all(check_spread.compare(got, decodings[0])["ok"] for got in decodings[1:])
    assert all(got[2] == 2 * 2 * 2 for got in decodings)  # rows, sparse layers, and steps after the prefill's token
