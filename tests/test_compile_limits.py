"""The compiled step serves any sequence of situations: Dynamo gives one function eight graphs, and C++ two lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import tiny
from generation import Ids, generate, profile_of
from torch import Tensor

from fasa_flex import FasaConfig, enable, fasa_attention
from fasa_flex.backends import specialization
from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.budget import Budget
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax

CHUNKS = torch.arange(16).view(1, 8, 2).expand(2, -1, -1)[:, :3].contiguous()


def states(queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((4, queries), (2, keys), (2, keys)))
    return q, k, v


@pytest.fixture
def traced(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and guarded as ever, but run without code being made, which takes minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile_(step, backend="eager", **options))
    specialization._compiled.cache_clear()
    yield
    specialization._compiled.cache_clear()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("queries", [1, 4])
def test_every_combination_of_modes_and_arguments(queries: int) -> None:
    """Thirty-two and more of one shape, twice."""
    q, k, v = states(queries, 30)
    spread = k.transpose(1, 2).contiguous().transpose(1, 2)
    room = torch.cat([k, k], dim=2)[:, :, :30]
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[:, :2] = False
    rows = DominantChunks.from_chunks(CHUNKS).pack(k)
    packed = [None, rows, PackedKeys.of(rows)] if queries == 1 else [None, rows]
    expected: dict[bool, Tensor] = {}
    for _ in range(2):
        for grad, masked, given, keys in itertools.product([False, True], [False, True], packed, [k, spread, room]):
            options: Any = {"n_fac": 5, "key_mask": mask if masked else None, "packed_keys": given}
            with torch.set_grad_enabled(grad):
                out = fasa_attention(q, keys, v, CHUNKS, backend="flex", **options)
            expected.setdefault(masked, fasa_attention(q, k, v, CHUNKS, backend="gather", **options))
            torch.testing.assert_close(out, expected[masked], atol=1e-5, rtol=1e-5)


class Weighted(Scorer):
    """A scorer with a number of its own, as a user's may have one for each layer; Dynamo guards on it."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def score(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
        return (query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].mT) * self.weight


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("backend", ["flex", "fastest"])
def test_a_scorer_for_each_of_many_layers(backend: Any) -> None:
    q, k, v = states(1, 30)
    valid, softmax = valid_keys(1, 30, None, q.device), Softmax(0.25)
    scorers = [Weighted((-1) ** layer / (layer + 1)) for layer in range(12)]
    for scorer in scorers * 2:
        call = Call(q, k, v, scorer, valid, Budget(5), "max", softmax)
        expected = sparse_attention(call, "gather")
        torch.testing.assert_close(sparse_attention(call, backend), expected, atol=1e-5, rtol=1e-5)


def test_queries_and_keys_that_both_change_compile_on_a_cpu() -> None:
    for queries, keys in ((10, 30), (12, 32)):
        q, k, v = states(queries, keys)
        out, expected = (fasa_attention(q, k, v, CHUNKS, n_fac=5, backend=way) for way in ("flex", "gather"))
        assert out.shape == q.shape
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_packed_keys_that_fill_their_tiles_compile_at_every_length_on_a_cpu() -> None:
    specialization._compiled.cache_clear()
    for keys in (32, 64, 96):
        q, k, v = states(1, keys)
        packed = PackedKeys.of(DominantChunks.from_chunks(CHUNKS).pack(k))
        out, expected = (
            fasa_attention(q, k, v, CHUNKS, n_fac=5, packed_keys=packed, backend=way) for way in ("flex", "gather")
        )
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_forward_on_a_growing_cache_compiles_no_token_anew(ids: Ids) -> None:
    """transformers' own recipe: a graph for the prompt, one for a token, and one for a token at any length."""
    model, prompt, graphs = tiny("Llama", num_hidden_layers=2), ids(24, rows=1), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with enable(model, profile_of(model), FasaConfig(n_fac=6, n_tip=2)) as fasa:
        expected = generate(model, prompt, max_new_tokens=6)[0]
        fasa.stats.reset()
        model.forward = torch.compile(model.forward, backend=backend)
        assert torch.equal(generate(model, prompt, max_new_tokens=6)[0], expected)
        assert fasa.stats.sparse_queries == 5
    assert len(graphs) == 3
