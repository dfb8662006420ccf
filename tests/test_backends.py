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
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import Marks, valid_keys
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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("lengths", "reads"), [((32,), [True]), ((32, 48), [True, False])])
def test_flex_on_a_cpu_reads_packed_keys_where_the_graph_has_one_length(
    call: Call, lengths: tuple[int, ...], reads: list[bool]
) -> None:
    """Once lengths vary it packs the keys anew, since Inductor's C++ would not compile; it selects the same keys."""
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(any(node.op == "placeholder" and "tiles" in node.name for node in graph.graph.nodes))
        return graph

    def attend(key: torch.Tensor, value: torch.Tensor, packed: PackedKeys, valid: torch.Tensor) -> torch.Tensor:
        return sparse_attention(replace(call, key=key, value=value, packed_keys=packed, valid=valid), "flex")

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for length in lengths:
        key, value = (integers(1, 2, length, 16, seed=length + n) for n in (0, 1))
        valid, packed = valid_keys(1, length, None, key.device), PackedKeys.of(call.scorer.pack(key))
        call.marks = Marks.of(valid, call.budget, samples=True)
        expected = sparse_attention(replace(call, key=key, value=value, packed_keys=packed, valid=valid), "gather")
        torch.testing.assert_close(compiled(key, value, packed, valid), expected, atol=1e-5, rtol=1e-5)
    assert graphs == reads
