"""FasaStats: what a forward adds, layers of different budgets, and bytes by the one definition of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import plain
from filled import packed_layers
from generation import NEW, PROMPT, Ids, generate, profile_of
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.baselines import Quest
from fasa_flex.core.budget import Budget
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.model.stats import FasaStats, tally

CPU = torch.device("cpu")


def test_a_tally_written_out() -> None:
    """Two rows of three queries; no valid key means padding."""
    n_valid = torch.tensor([[0, 5, 9], [0, 0, 7]])
    sparse = torch.tensor([[True, False, True], [True, True, True]])
    assert tally(n_valid, None, Budget(4)).tolist() == [3, 0, 0, 0]
    assert tally(n_valid, sparse, Budget(4)).tolist() == [1, 2, 8, 16]
    assert tally(n_valid, sparse, Budget(0.5)).tolist() == [1, 2, 5 + 4, 16]
    assert tally(n_valid, sparse, Budget((4, 8))).tolist() == [1, 2, 8 + 8 + 7, 16]  # summed over the two heads


def test_layers_of_different_budgets_and_reads() -> None:
    """Layer 0 is dense; layer 1 attends to 5.75 of 8 keys, and 1/4 to rank; layer 2 to 2 of 8, and nothing to rank."""
    stats = FasaStats([CPU] * 3, {1: ReadShare(0.25), 2: ReadShare(0.0)}, {1: 2})
    n_valid = torch.tensor([[9, 7]])
    every = torch.ones(1, 2, dtype=torch.bool)
    stats.add(0, tally(n_valid, None, Budget(4)))
    stats.add(1, tally(n_valid, every, Budget((4, 8))))
    stats.add(2, tally(n_valid, every, Budget(2)))
    assert (stats.dense_queries, stats.sparse_queries) == (2, 4)
    assert [layer.mean_selected for layer in stats.per_layer] == [0, (8 + 15) / 4, 2]
    assert [layer.mean_valid for layer in stats.per_layer] == [0, 8, 8]
    assert stats.kv_share == pytest.approx((5.75 + 2) / 16)
    assert [layer.kv_bytes_share for layer in stats.per_layer] == [None, 0.25 + 5.75 / 8, 2 / 8]
    assert stats.kv_bytes_share == pytest.approx((2 + 5.75 + 2) / 16)
    stats.reset()
    assert (stats.dense_queries, stats.sparse_queries, stats.kv_share, stats.kv_bytes_share) == (0, 0, 1.0, 1.0)


def test_a_state_is_read_once_for_each_query() -> None:
    """Three queries of 40 keys, 5 attended to each, and a state of 16 dimensions: 17 halves of a key and value."""
    reads = ReadShare(0.25).completed(16, first_order=True)
    stats = FasaStats([CPU], {0: reads}, {})
    stats.add(0, tally(torch.tensor([[40, 40, 40]]), torch.ones(1, 3, dtype=torch.bool), Budget(5)))
    assert stats.kv_bytes_share == pytest.approx(0.25 + (5 + 8.5) / 40)
    assert reads.by_head(4).state == 8.5
    assert ReadShare(0.25).completed(16, first_order=False).state == 0.5
    assert reads.of(1, 2) == 1.0


def test_a_layer_that_does_not_state_its_reads_leaves_the_bytes_unknown() -> None:
    stats = FasaStats([CPU] * 2, {0: ReadShare(0.25)}, {})
    some = tally(torch.tensor([[9]]), torch.tensor([[True]]), Budget(4))
    stats.add(0, some)
    assert stats.kv_bytes_share is not None
    stats.add(1, some)
    assert stats.kv_bytes_share is None
    assert "kv_bytes_share=None" in repr(stats)


@pytest.mark.parametrize(
    ("weights", "counts"), [((1.0, 5, 3), [20, 12]), ((1.0, (2, 1), (3, 2)), [(16, 8), (24, 16)])], ids=str
)
def test_a_model_counts_each_layers_own_budget(
    llama: PreTrainedModel, ids: Ids, weights: tuple[float, ...], counts: list[int | tuple[int, int]]
) -> None:
    """16 tokens in the mean of layers 1 and 2; 2 of a head's 8 chunks rank: a quarter of the keys."""
    with enable(llama, profile_of(llama), plain(n_fac=16, layer_budgets=weights)) as fasa:
        generate(llama, ids(PROMPT, rows=1))
        valid = [PROMPT + step for step in range(1, NEW)]
        layers = fasa.stats.per_layer[1:]
    for layer, count in zip(layers, counts, strict=True):
        heads = count if isinstance(count, tuple) else (count,)
        selected = sum(sum(min(n, head) for head in heads) for n in valid) / len(heads)
        assert layer.sparse_queries == NEW - 1
        assert layer.mean_selected == pytest.approx(selected / (NEW - 1))
        assert layer.kv_bytes_share == pytest.approx(1 / 8 + selected / sum(valid))


@pytest.mark.parametrize(
    ("config", "ranking", "rows"),
    [
        (plain(n_fac=4), 2 / 16, 1),
        (plain(n_fac=4, packed_dtype="bfloat16"), 1 / 16, 1),
        (plain(n_fac=4, packed_dtype="int8"), 6 / 128, 1),  # 4 numbers and a scale of 2 bytes, of 32 of 4 bytes
        (plain(n_fac=4, packed_dtype="int4"), 4 / 128, 1),  # 4 half bytes and a scale
        (plain(n_fac=4, group_reduce="none"), 2 / 16, 2),
        (plain(n_fac=4, per="query_head"), 4 / 16, 2),
    ],
    ids=["packed", "bfloat16", "int8", "int4", "by head", "chunks by head"],
)
def test_what_a_query_reads(
    make_model: Callable[..., PreTrainedModel], ids: Ids, config: FasaConfig, ranking: float, rows: int
) -> None:
    model = make_model("Llama")
    with enable(model, profile_of(model), config) as fasa, torch.no_grad():
        generate(model, ids(PROMPT, rows=1), max_new_tokens=2)
        assert fasa.stats.kv_bytes_share == pytest.approx(ranking + rows * 4 / (PROMPT + 1))


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"completion": "none"}, 0),
        ({"completion": "mean"}, 16),
        ({}, 16 + 16 * 16),
        ({"completion_strength": 0.0}, 16),
        ({"group_reduce": "none"}, 16 + 16 * 16),  # the heads of a group read it once
    ],
    ids=str,
)
def test_what_completes_a_query_is_read_in_every_step(
    llama: PreTrainedModel, ids: Ids, changes: dict[str, Any], numbers: int
) -> None:
    """Per head a mean value and a covariance of 16-dimensional keys and values, where a token is 32 numbers."""
    steps, prompt = 3, 90
    with enable(llama, profile_of(llama), FasaConfig(n_fac=8, **changes)) as fasa, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(prompt, rows=1), past_key_values=cache)
        for seed in range(steps):
            llama(ids(1, seed=seed, rows=1), past_key_values=cache)
        valid, rows = sum(prompt + 1 + step for step in range(steps)), 2 if "group_reduce" in changes else 1
        packed = (8 / 2 + 2) / (32 * 4)  # half of a head's dimensions in four bits, a scale, of 32 numbers of 4 bytes
        expected = packed + steps * (rows * 8 + numbers / 32) / valid
        assert fasa.stats.kv_bytes_share == pytest.approx(expected)
        state = packed_layers(cache)[0].state
        held = 0 if state is None else state.mean_value.numel() + state.covariance.numel()
        assert held == 2 * numbers  # two heads


def test_completion_without_a_state_reads_every_key(llama: PreTrainedModel, ids: Ids) -> None:
    """As chunks of each query head's own, which are not packed, have none."""
    config = FasaConfig(n_fac=4, per="query_head", completion="first_order")
    with enable(llama, profile_of(llama), config) as fasa, torch.no_grad():
        generate(llama, ids(PROMPT, rows=1), max_new_tokens=2)
        assert fasa.stats.kv_bytes_share == 1.0


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (FasaConfig(n_fac=4), ("agreement", "int4", "first_order")),  # the profile knows nothing else
        (FasaConfig(n_fac=4, packed_dtype=None, completion="mean"), ("agreement", "float32", "mean")),
        (FasaConfig.paper(n_fac=4), ("agreement", None, "none")),
    ],
    ids=["defaults", "float32, mean", "paper"],
)
def test_stats_say_what_ran(
    llama: PreTrainedModel, config: FasaConfig, settings: tuple[str | None, str | None, str]
) -> None:
    with enable(llama, profile_of(llama), config) as fasa:
        assert (fasa.criterion, fasa.packed_dtype, fasa.completion) == settings
        expected = dict(zip(("criterion", "packed_dtype", "completion"), settings, strict=True))
        assert fasa.stats.as_dict().items() >= expected.items()
        for name, value in expected.items():
            assert f"{name}={value}" in repr(fasa.stats)
            assert f"{name}={value}" in repr(fasa)


def test_what_ran_is_what_a_prompt_has_led_to(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, config=FasaConfig(n_fac=16)) as fasa, torch.no_grad():
        assert fasa.stats.as_dict()["criterion"] is None
        llama(ids(200, rows=1))
        assert fasa.stats.as_dict()["criterion"] == fasa.criterion == "variance"
    with enable(llama, profile_of(llama), scorer=lambda layer: Quest(4)) as fasa:
        assert fasa.settings == {"criterion": None, "packed_dtype": None, "completion": "none"}


def test_heads_that_select_for_themselves_read_rows_of_their_own_unless_they_select_together() -> None:
    assert ReadShare(0.1, 1.0).by_head(4) == ReadShare(0.1, 4.0)
    assert ReadShare(0.0, 1.5, together=True).by_head(4).rows == 1.5
