"""Which backend serves a call: by name it serves or refuses, automatically the first that can, and it is told once."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import integers, pick_chunks

from fasa_flex.backends import table
from fasa_flex.backends.table import BACKENDS, ORDER, sparse_attention
from fasa_flex.baselines import AllDimensions, Sampled
from fasa_flex.core.budget import Budget
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax


@pytest.fixture
def call() -> Call:
    q, k, v = (integers(1, heads, n, 16, seed=heads + n) for heads, n in ((4, 1), (2, 30), (2, 30)))
    scorer = DominantChunks.from_chunks(pick_chunks(2, 2))
    return Call(q, k, v, scorer, valid_keys(1, 30, None, q.device), Budget(5), "softmax", Softmax(0.3))


@pytest.mark.parametrize("backend", ["flex", "reference", "triton"])
def test_keys_on_another_device_are_refused_and_not_gathered_in_silence(call: Call, backend: Any) -> None:
    elsewhere = replace(call, key=call.key.to("meta"))
    with pytest.raises(ValueError, match=f"^backend '{backend}' cannot serve this call: .*; use backend='auto'.$"):
        sparse_attention(elsewhere, backend)


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_a_scorer_that_attends_by_itself_is_refused_by_others_than_gather(call: Call, backend: Any) -> None:
    call.scorer = Sampled(AllDimensions())
    with pytest.raises(ValueError, match="Sampled attends by itself"):
        sparse_attention(call, backend)
    assert torch.equal(sparse_attention(call, "auto"), sparse_attention(call, "gather"))


def test_the_automatic_choice_is_logged_once(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    table._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="fasa_flex"):
        for backend in ("auto", "auto", "gather"):
            sparse_attention(call, backend)
    assert [record.message for record in caplog.records] == ["backend 'auto' is 'gather' for one query a row on cpu"]


def test_automatic_backends_end_on_one_that_serves_every_call() -> None:
    for names in ORDER.values():
        assert set(names) <= set(BACKENDS)
        assert names[-1] == "gather"
