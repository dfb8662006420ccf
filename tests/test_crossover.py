"""backend="fastest": dense below the measured crossover, sparse above it; every other backend is always sparse."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from generation import Ids, generate, profile_of
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import fasa_flex.backends.specialization
import fasa_flex.core.method
import fasa_flex.model.crossover
import fasa_flex.model.layer
from fasa_flex import FasaConfig, enable
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.core.config import Backend
from fasa_flex.core.method import Call
from fasa_flex.model.crossover import sparse_is_faster


def layer(batch: int, heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys and values of 128 float32 dimensions, without memory of their own."""
    states = torch.empty(1).expand(batch, heads, length, 128)
    return torch.empty(1).expand(batch, 4 * heads, 1, 128), states, states


@pytest.mark.parametrize(
    ("batch", "heads", "length", "budget", "expected"),
    [
        (1, 8, 3600, 64, False),
        (1, 8, 3700, 64, True),  # 3700 tokens of eight heads, float32: 30.3 MB
        (8, 8, 464, 116, True),  # nearly the same bytes
        (8, 8, 464, 117, False),  # but more than a quarter of them would be selected
        (1, 1, 7000, 256, False),
        (1, 8, 65536, 256, True),
        (1, 8, 65536, 16385, False),
    ],
)
def test_the_rule(batch: int, heads: int, length: int, budget: int, expected: bool) -> None:
    for grouped in (False, True):
        assert sparse_is_faster(*layer(batch, heads, length), budget, grouped) is expected


@pytest.mark.parametrize(
    ("batch", "length", "grouped", "growing", "expected"),
    [
        (1, 32768, False, False, False),  # 134 MB in bfloat16
        (1, 65536, False, False, True),
        (1, 4096, True, False, False),  # 17 MB
        (1, 8192, True, False, True),
        (8, 4096, True, False, True),
        (8, 4095, True, False, False),  # of 16 budgets the least was measured
        (2, 131072, True, True, False),  # 1.1 GB: Python decides
        (4, 131072, True, True, True),
    ],
)
def test_on_a_gpu_the_rule_asks_what_dense_attention_would_be(
    batch: int, length: int, grouped: bool, growing: bool, expected: bool
) -> None:
    states = torch.empty(batch, 8, length, 128, dtype=torch.bfloat16, device="meta")
    query = Mock(device=torch.device("cuda"))
    assert sparse_is_faster(query, states, states, 256, grouped, growing) is expected


def test_below_the_crossover_the_model_is_dense_and_counts_so(llama: PreTrainedModel, ids: Ids) -> None:
    """Within rounding: what is dense then is grouped attention, not the model's own."""
    prompt, profile = ids(40, rows=1), profile_of(llama)
    dense = generate(llama, prompt)
    with enable(llama, profile, FasaConfig(n_fac=6, backend="fastest")) as fasa:
        tokens, logits = generate(llama, prompt)
        assert fasa.stats.sparse_queries == 0
    assert torch.equal(tokens, dense[0])
    torch.testing.assert_close(logits, dense[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_crossover_is_that_of_grouped_attention(
    llama: PreTrainedModel, ids: Ids, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what would be dense, under a mask, as of a static cache, and without."""
    monkeypatch.setitem(fasa_flex.model.crossover.KV_BYTES, ("cpu", False), 0)
    with enable(llama, profile_of(llama), FasaConfig(n_fac=6, backend="fastest")) as fasa:
        generate(llama, ids(40, rows=1), cache_implementation=cache)
        assert fasa.stats.sparse_queries == 0


def test_above_the_crossover_it_is_auto(llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a crossover of 43 tokens, the steps before it are dense."""
    prompt, profile = ids(40, rows=1), profile_of(llama)
    token = 2 * 2 * 16 * 4  # keys and values, two heads of 16 float32
    monkeypatch.setitem(fasa_flex.model.crossover.KV_BYTES, ("cpu", True), 43 * token)
    with enable(llama, profile, FasaConfig(n_fac=5, backend="fastest")) as fasa:
        generate(llama, prompt, max_new_tokens=6)
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 3, 3]  # at 43, 44 and 45 keys
        assert [layer.dense_queries for layer in fasa.stats.per_layer] == [45, 42, 42]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_it_compiles_twice_for_a_growing_cache_and_decodes_as_gather(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 steps go beyond the first buffer: the second compilation serves any length."""
    monkeypatch.setitem(fasa_flex.model.crossover.KV_BYTES, ("cpu", True), 0)
    prompt, profile = ids(100, rows=2), profile_of(llama)
    counters.clear()
    results = []
    for backend in ("gather", "fastest"):
        with enable(llama, profile, FasaConfig(n_fac=8, n_sink=1, backend=backend)) as fasa:
            results.append(generate(llama, prompt, max_new_tokens=300)[0])
            assert fasa.stats.sparse_queries == 2 * 2 * 299
    assert torch.equal(*results)
    assert counters["stats"]["unique_graphs"] == 2


def test_only_an_eager_step_of_a_growing_cache_is_one(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rule for growing caches out of reach, a static one is sparse and a growing one dense."""
    monkeypatch.setitem(fasa_flex.model.crossover.KV_BYTES, ("cpu", True), 0)
    monkeypatch.setitem(fasa_flex.model.crossover.GROWING_BYTES, "cpu", 1 << 40)
    sparse = {}
    for cache in ("static", "dynamic"):
        with enable(llama, profile_of(llama), FasaConfig(n_fac=6, backend="fastest")) as fasa, torch.no_grad():
            generate(llama, ids(40, rows=1), max_new_tokens=3, cache_implementation=cache)
            sparse[cache] = fasa.stats.sparse_queries
    assert sparse == {"static": 2 * 2, "dynamic": 0}


def test_where_python_decides_a_growing_layer_is_packed_at_its_first_sparse_step(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it is the plain one; from then on the logits are those of "auto", which packs from the start."""
    monkeypatch.setattr(fasa_flex.backends.specialization, "_compiled", lambda *_: fasa_flex.core.method.attend)
    monkeypatch.setitem(fasa_flex.model.crossover.KV_BYTES, ("cpu", True), 0)
    monkeypatch.setitem(fasa_flex.model.crossover.GROWING_BYTES, "cpu", 1 << 40)
    tokens, plain = [ids(1, seed, rows=2) for seed in range(3)], DynamicCache(config=llama.config)

    def decode(backend: Backend, cache: DynamicCache) -> tuple[torch.Tensor, int, list[type]]:
        with enable(llama, profile_of(llama), FasaConfig(n_fac=6, backend=backend)) as fasa:
            logits = [llama(token, past_key_values=cache).logits for token in tokens]
            return torch.cat(logits), fasa.stats.sparse_queries, [type(layer) for layer in cache.layers]

    with torch.no_grad():
        llama(ids(40, rows=2), past_key_values=plain)
        expected, *sparse = decode("auto", copy.deepcopy(plain))
        assert sparse == [2 * 2 * 3, [DynamicLayer, PackedLayer, PackedLayer]]
        dense, *rest = decode("fastest", copy.deepcopy(plain))
        assert rest == [0, [DynamicLayer] * 3]
        assert not torch.allclose(dense, expected)
        monkeypatch.setitem(fasa_flex.model.crossover.GROWING_BYTES, "cpu", 0)
        calls, attend = list[Call](), fasa_flex.model.layer.sparse_attention

        def recorded(call: Call, backend: Backend) -> torch.Tensor:
            calls.append(call)
            return attend(call, backend)

        monkeypatch.setattr(fasa_flex.model.layer, "sparse_attention", recorded)
        late, *rest = decode("fastest", plain)
    assert rest == sparse
    assert len(calls) == 2 * 3
    assert all(call.completion is not None and call.completion.state is not None for call in calls)
    torch.testing.assert_close(late, expected, rtol=1e-5, atol=1e-5)
