"""A mean budget over layers and heads: sums that are exact, the pyramid's line, weights, forced tokens, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import DIM, integers, pick_chunks, plain_attention, unrounded
from generation import PROMPT, Ids, generate, left_padded, profile_of
from hypothesis import given
from hypothesis import strategies as st
from sentences import raises_sentence
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.backends.table import sparse_attention
from fasa_flex.backends.triton.dispatch import why_no_kernels
from fasa_flex.core.budget import Budget
from fasa_flex.core.config import Backend
from fasa_flex.core.layer_budgets import check_layer_budgets, spread_budget
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax


def test_uniform_gives_every_layer_the_budget_itself() -> None:
    assert spread_budget(Budget(7, 1, 2), "uniform", [1, 3], 2) == {1: Budget(7, 1, 2), 3: Budget(7, 1, 2)}


def test_pyramid_written_out() -> None:
    """Mean 100 over five layers: from 195 down to 5, by 47.5 a layer."""
    counts = [budget.n_fac for budget in spread_budget(Budget(100), "pyramid", [1, 2, 3, 4, 5], 2).values()]
    assert counts == pytest.approx([195, 147.5, 100, 52.5, 5], abs=0.5)
    assert sum(counts) == 500


def test_pyramid_of_a_share_and_of_one_layer() -> None:
    shares = [budget.n_fac for budget in spread_budget(Budget(0.4), "pyramid", [0, 1, 2], 2).values()]
    assert shares == pytest.approx([0.78, 0.4, 0.02])
    assert spread_budget(Budget(9), "pyramid", [4], 2) == {4: Budget(9)}


def test_pyramid_spreads_what_is_not_forced_as_pyramidkv_does() -> None:
    budgets = spread_budget(Budget(110, n_sink=4, n_recent=6), "pyramid", [0, 1, 2], 2)
    assert budgets == {0: Budget(205, 4, 6), 1: Budget(110, 4, 6), 2: Budget(15, 4, 6)}


def test_weights_are_of_the_models_layers_and_those_of_dense_ones_are_ignored() -> None:
    assert spread_budget(Budget(64), (99, 3, 1), [1, 2], 2) == {1: Budget(96), 2: Budget(32)}


def test_weights_of_heads_and_of_a_whole_layer_mix() -> None:
    budgets = spread_budget(Budget(10), ((3, 1), 2), [0, 1], 2)
    assert budgets == {0: Budget((15, 5)), 1: Budget((10, 10))}


def test_none_is_left_without_a_token_and_the_others_pay_for_it() -> None:
    assert spread_budget(Budget(4), (1000, 1, 1), [0, 1, 2], 1) == {0: Budget(10), 1: Budget(1), 2: Budget(1)}


@given(
    n_fac=st.integers(1, 3000),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    forced=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    kv_heads=st.sampled_from([0, 1, 4]),
)
def test_the_mean_is_exact_and_counts_are_within_one_of_their_weight(
    n_fac: int, weights: list[float], forced: tuple[int, int], kv_heads: int
) -> None:
    """A layer's weight w, or its heads' weights w, 2w, 3w ... where ``kv_heads``."""
    forced = forced if sum(forced) <= n_fac else (0, 0)
    given: Any = tuple(tuple(w * (n + 1) for n in range(kv_heads)) for w in weights) if kv_heads else tuple(weights)
    layers = range(len(weights))
    budgets = spread_budget(Budget(n_fac, *forced), check_layer_budgets(given), layers, max(1, kv_heads))
    counts = [n for b in budgets.values() for n in (b.n_fac if isinstance(b.n_fac, tuple) else (b.n_fac,))]
    flat = [w for row in given for w in (row if isinstance(row, tuple) else (row,))]
    assert sum(counts) == n_fac * len(flat)
    assert min(counts) >= max(1, sum(forced))
    assert all((b.n_sink, b.n_recent) == forced for b in budgets.values())
    unit = (n_fac - sum(forced)) * len(flat) / sum(flat)
    if min(unit * w for w in flat) >= 1:  # nobody was lifted to a token
        assert all(abs(n - sum(forced) - unit * w) <= 1 for n, w in zip(counts, flat, strict=True))


@pytest.mark.parametrize(
    ("budget", "how", "named"),
    [
        (Budget(8), (1.0, 2.0), "weighs 2 layers and layer 2 is sparse"),
        (Budget(8), (1.0, (1, 2, 3), 1.0), "weighs 3 heads in layer 1, it has 2"),
        (Budget(0.5), (1.0, (1, 2), 1.0), "heads cannot have weights of a share"),
        (Budget(0.6), "pyramid", "1.17 of its keys"),
    ],
    ids=["layers", "heads", "share of heads", "share above 1"],
)
def test_weights_that_do_not_fit_are_refused(budget: Budget, how: Any, named: str) -> None:
    with raises_sentence(ValueError, match=named):
        spread_budget(budget, how, [1, 2] if how != "pyramid" else [0, 1, 2], 2)


@pytest.mark.parametrize(
    "given",
    ["pyramids", (), (1, 0), (1, -2.0), (1, float("inf")), (1, float("nan")), ("1", "2"), (True, 1), (1, (1, 0)), 3],
    ids=str,
)
def test_what_is_no_weight_is_refused(given: Any) -> None:
    with raises_sentence(ValueError, match="layer_budgets must be"):
        FasaConfig(layer_budgets=given)


def test_lists_become_tuples_so_that_a_config_round_trips_through_json() -> None:
    config = FasaConfig(layer_budgets=[1, [2, 0.5]])
    assert config.layer_budgets == (1, (2, 0.5))
    assert FasaConfig(**config.to_dict()) == config


# In a model: three layers, the first dense; two key/value heads.

PYRAMID = unrounded(n_fac=12, layer_budgets="pyramid", dense_layers=())
OF_LAYERS = unrounded(n_fac=8, layer_budgets=(9, 3, 1), n_sink=1)
OF_HEADS = unrounded(n_fac=24, layer_budgets=(1, (1, 3), (5, 2)), n_recent=1)  # some heads fit their budgets, some not
BY_QUERY_HEAD = unrounded(n_fac=10, layer_budgets=(1, (1, 3), 1), group_reduce="none")
CONFIGS = [PYRAMID, OF_LAYERS, OF_HEADS, BY_QUERY_HEAD]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.layer_budgets))
def test_generation_equals_the_reference_backend(llama: PreTrainedModel, ids: Ids, config: FasaConfig) -> None:
    prompts = left_padded([ids(n, seed=n) for n in (PROMPT, 29, 13)])
    profile = profile_of(llama)
    results = []
    for backend in ("gather", "auto", "reference"):
        with enable(llama, profile, replace(config, backend=backend)) as fasa:
            results.append((*generate(llama, *prompts), fasa.stats.as_dict()))
    uniform = replace(config, layer_budgets="uniform")
    with enable(llama, profile, uniform):
        other = generate(llama, *prompts)[1]
    for tokens, logits, stats in results[:2]:
        assert torch.equal(tokens, results[2][0])
        torch.testing.assert_close(logits, results[2][1], atol=2e-4, rtol=1e-4)
        assert stats == results[2][2]
    assert (other - results[2][1]).abs().max() > 0.01  # how the budget is spread matters here


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.layer_budgets))
def test_a_mixed_pass_equals_token_by_token(llama: PreTrainedModel, ids: Ids, config: FasaConfig) -> None:
    row, start = ids(40), 17
    with enable(llama, profile_of(llama), config) as fasa, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        parts = [row[:start], *(token[None] for token in row[start:])]
        expected = torch.cat([llama(part[None], past_key_values=cache).logits[0] for part in parts])
        counts = fasa.stats.as_dict()
        fasa.stats.reset()
        with fasa.sparse_from(torch.tensor([start])):
            got = llama(row[None]).logits[0]
        assert fasa.stats.as_dict() == counts
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_a_context_within_the_smallest_budget_is_bit_identical_to_dense(llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(20, rows=1)
    dense = generate(llama, prompt, max_new_tokens=2)[1]
    config = FasaConfig(n_fac=28, layer_budgets=(1, (1, 3), (1, 1)), dense_layers=())  # the smallest is 21
    with enable(llama, profile_of(llama), config) as fasa:
        assert torch.equal(generate(llama, prompt, max_new_tokens=2)[1], dense)
        assert fasa.stats.sparse_queries == 0
        generate(llama, prompt, max_new_tokens=3)
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [1, 1, 1]  # of 22 keys, in the heads of 21


def call(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, chunks and key mask of three queries in two rows, the second padded."""
    q, k = integers(2, 4, 3, DIM, seed=1), integers(2, 2, length, DIM, seed=2)
    v = torch.randn(2, 2, length, DIM, generator=torch.Generator().manual_seed(3))
    return q, k, v, pick_chunks(2, 2), torch.arange(length) >= torch.tensor([[0], [4]])


def attend(backend: Backend, length: int, compiled: bool = False) -> Tensor:
    """Head 0 takes 5 keys, head 1 takes 20."""
    q, k, v, chunks, mask = call(length)
    valid, scorer = valid_keys(3, length, mask, q.device), DominantChunks.from_chunks(chunks)
    step = torch.compile(sparse_attention, fullgraph=True) if compiled else sparse_attention
    return step(Call(q, k, v, scorer, valid, Budget((5, 20), 1, 2), "max", Softmax(DIM**-0.5)), backend)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("length", [18, 40])
def test_heads_of_their_own_budgets_are_heads_alone(length: int, backend: Backend) -> None:
    """Among 18 keys one head is over its budget and the other is not."""
    q, k, v, chunks, mask = call(length)
    alone = [
        plain_attention(*part, n_fac=n_fac, n_sink=1, n_recent=2, key_mask=mask, backend="reference")
        for n_fac, *part in zip((5, 20), q.split(2, 1), k.split(1, 1), v.split(1, 1), chunks.split(1), strict=True)
    ]
    torch.testing.assert_close(attend(backend, length), torch.cat(alone, dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gather", "flex"])
def test_heads_of_their_own_budgets_compiled(backend: Backend) -> None:
    with torch.no_grad():
        torch.testing.assert_close(attend(backend, 40, compiled=True), attend("reference", 40))


def test_the_kernels_refuse_budgets_of_heads_and_auto_does_without_them() -> None:
    query = mock.Mock(is_cuda=True, shape=(1, 4, 1, 16))
    scorer = DominantChunks.from_chunks(pick_chunks(2, 2))
    packed = PackedKeys.of(torch.zeros(1, 2, 40, 4))
    call = Call(query, mock.Mock(), mock.Mock(), scorer, mock.Mock(), Budget((5, 20)), "max", mock.Mock(), packed)
    reason = why_no_kernels(call)
    assert reason == "n_fac must be one count or share for all heads, got (5, 20)"
    torch.testing.assert_close(attend("auto", 40), attend("reference", 40))
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call"):
        attend("triton", 40)


def test_a_shard_of_budgets_is_the_rank_s_own_and_decides_with_all() -> None:
    whole = Budget((8, 24, 16, 16), n_sink=2)
    n_valid = torch.tensor([[4, 12, 30]])
    parts = [Budget((8, 24, 16, 16), n_sink=2, shard=(rank, 2)) for rank in range(2)]
    own = torch.cat([part.of(n_valid[:, None, None]) for part in parts], dim=1)
    assert own.equal(whole.of(n_valid[:, None, None]))
    for part in parts:
        assert part.total(n_valid).equal(whole.total(n_valid))
        assert part.exceeded(n_valid).equal(whole.exceeded(n_valid))
        assert (part.heads, part.widest(100), part.covers(8)) == (4, 24, True)
    assert [parts[1].of_head(head).n_fac for head in range(2)] == [16, 16]
    spread = spread_budget(FasaConfig(n_fac=16).budget, ((1, 3), (1, 1)), [0, 1], 2, (1, 2))
    assert spread[0].of(torch.tensor([[[[100]]]])).shape == (1, 1, 1, 1)
