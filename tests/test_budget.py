"""Budget: what is refused, and shares at their edges."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from sentences import raises_sentence

from fasa_flex import FasaConfig, fasa_attention
from fasa_flex.core.budget import Budget, check_count
from fasa_flex.core.selection import forced_keys


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_fac": 0}, "n_fac must be an integer of at least 1, got 0"),
        ({"n_fac": -0.5}, "n_fac as a share"),
        ({"n_fac": 0.0}, "n_fac as a share"),
        ({"n_fac": 1.0 + 1e-9}, "n_fac as a share"),
        ({"n_fac": True}, "n_fac must be an integer of at least 1, got True"),
        ({"n_fac": "6"}, "n_fac must be an integer"),
        ({"n_fac": 6, "n_sink": -1}, "n_sink must be an integer of at least 0, got -1"),
        ({"n_fac": 6, "n_recent": -1}, "n_recent must be an integer of at least 0, got -1"),
        ({"n_fac": 6, "n_sink": 1.5}, "n_sink must be an integer"),
        ({"n_fac": 6, "n_recent": True}, "n_recent must be an integer"),
        ({"n_fac": 6, "n_sink": 3, "n_recent": 4}, r"n_sink \+ n_recent = 7 exceeds the budget n_fac = 6"),
        ({"n_fac": 3, "n_sink": 4}, r"n_sink \+ n_recent = 4 exceeds the budget n_fac = 3"),
    ],
    ids=str,
)
def test_what_is_no_budget_is_refused(fields: dict[str, Any], named: str) -> None:
    with raises_sentence(ValueError, match=named):
        Budget(**fields)


def test_forced_tokens_may_fill_the_budget_or_exceed_a_share() -> None:
    assert Budget(7, n_sink=3, n_recent=4).of(torch.tensor([9])).tolist() == [7]
    assert Budget(0.1, n_sink=3, n_recent=4).of(torch.tensor([10])).tolist() == [1]
    assert Budget(1).n_sink == Budget(1).n_recent == 0


@pytest.mark.parametrize(
    ("allowed", "forced"),
    [(1, (0, 0)), (2, (0, 1)), (7, (0, 3)), (8, (1, 4)), (31, (3, 15)), (32, (4, 16)), (64, (4, 32)), (4096, (4, 32))],
)
def test_unless_told_4_and_32_are_forced_of_an_eighth_and_a_half_at_most(allowed: int, forced: tuple[int, int]) -> None:
    budget = Budget(allowed, None, None)
    assert budget.forced(allowed) == forced
    assert [int(count) for count in budget.forced(torch.tensor(allowed))] == list(forced)
    assert Budget(64, 3, None).forced(allowed) == (3, forced[1])
    assert Budget(64, None, 5).forced(allowed) == (forced[0], 5)


def test_a_share_forces_by_what_each_query_may_attend_to() -> None:
    """A half of 8, 20 and 200 keys."""
    for n_valid, first, last in ((8, 0, 2), (20, 1, 5), (200, 4, 32)):
        valid = torch.arange(200).view(1, 1, 1, 1, -1) < n_valid
        forced = forced_keys(valid, Budget(0.5, None, None)).flatten().nonzero().flatten().tolist()
        assert forced == [*range(first), *range(n_valid - last, n_valid)]


def test_a_budget_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(3).n_fac = 4


@pytest.mark.parametrize(
    ("share", "keys", "expected"),
    [
        (2 / 3, 3, 2),  # not 3: the double below 2/3 is rounded up to the next trillionth
        (1 / 3, 3, 1),
        (1.0, 5, 5),
        (0.5, 5, 3),
        (1e-15, 100_000, 1),  # however small, one key of any
        (1e-15, 0, 0),
    ],
)
def test_shares_at_their_edges(share: float, keys: int, expected: int) -> None:
    assert Budget(share).of(torch.tensor([keys])).tolist() == [expected]
    assert Budget(share).widest(keys) == expected


# A count for each head.


def test_heads_take_the_smaller_of_theirs_and_what_is_there() -> None:
    n_valid = torch.tensor([[2, 5, 9], [0, 4, 7]])[:, None, None]  # [B, 1, 1, Q]
    counts = Budget((3, 8)).of(n_valid)
    assert counts[:, :, 0].tolist() == [[[2, 3, 3], [2, 5, 8]], [[0, 3, 3], [0, 4, 7]]]
    assert Budget((3, 8)).total(n_valid[:, 0, 0]).tolist() == [[4, 8, 11], [0, 7, 10]]
    assert Budget(3).total(n_valid[:, 0, 0]).tolist() == [[2, 3, 3], [0, 3, 3]]


def test_heads_exceed_one_by_one_and_cover_together() -> None:
    budget = Budget((3, 8))
    assert budget.exceeded(torch.tensor([[2, 3, 4, 8, 9]])).tolist() == [[False, False, True, True, True]]
    assert Budget(0.5).exceeded(torch.tensor([[0, 1, 2, 9]])).tolist() == [[False, False, True, True]]
    assert Budget(1.0).exceeded(torch.tensor([[0, 1, 2, 9]])).tolist() == [[False] * 4]
    assert [budget.covers(keys) for keys in (2, 3, 4, 8)] == [True, True, False, False]
    assert [budget.widest(keys) for keys in (2, 5, 9)] == [2, 5, 8]
    assert (budget.heads, Budget(8).heads, Budget(0.5).heads) == (2, 1, 1)
    assert [b.is_count for b in (budget, Budget(8), Budget(0.5))] == [False, True, False]
    assert [Budget((3, 8), 1, 2).of_head(head) for head in (0, 1)] == [Budget(3, 1, 2), Budget(8, 1, 2)]
    assert Budget(0.5).of_head(1) == Budget(0.5)


@pytest.mark.parametrize(
    ("n_fac", "named"),
    [
        ((), "a count for each key/value head, got none"),
        ((3, 0), "n_fac must be an integer of at least 1, got 0"),
        ((3, 0.5), "n_fac must be an integer of at least 1, got 0.5"),
        ((8, 2), r"n_sink \+ n_recent = 3 exceeds the budget n_fac = 2"),
    ],
    ids=str,
)
def test_counts_of_heads_that_are_none_are_refused(n_fac: tuple[Any, ...], named: str) -> None:
    with raises_sentence(ValueError, match=named):
        Budget(n_fac, n_sink=1, n_recent=2)


def test_numbers_of_numpy_are_numbers() -> None:
    """Everywhere that takes a budget, and as JSON; one count for all heads is a count."""
    assert Budget(np.int64(20), np.int32(2), np.int64(3)) == Budget(20, 2, 3)
    assert Budget(np.float64(0.1)) == Budget(0.1)
    assert Budget((20,)) == Budget(20)
    assert Budget((np.int64(20), 30)) == Budget((20, 30))
    assert type(Budget(np.float64(0.1)).n_fac) is float
    config = FasaConfig(n_fac=np.int64(20), n_tip=np.int64(2), n_sink=np.int64(1), dense_layers=(np.int64(0),))
    assert json.loads(json.dumps(config.to_dict())) == json.loads(
        json.dumps(FasaConfig(n_fac=20, n_tip=2, n_sink=1, dense_layers=(0,)).to_dict())
    )
    for value in (np.bool_(True), True, "20", None, np.array([20]), (np.bool_(True),)):
        with pytest.raises(ValueError, match="n_fac"):
            Budget(value)
    check_count("max_cache_len", np.int64(3), 1)
    with pytest.raises(ValueError, match="max_cache_len must be an integer of at least 1, got 0"):
        check_count("max_cache_len", np.int64(0), 1)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_the_operator_takes_any_number_as_its_budget(backend: Any) -> None:
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 8, generator=drawn) for heads, length in ((4, 1), (2, 40), (2, 40)))
    chunks = torch.tensor([[[0, 4], [1, 5]]] * 2)

    def attend(n_fac: Any) -> torch.Tensor:
        return fasa_attention(q, k, v, chunks, n_fac, backend=backend)

    for given, number in ((np.int64(20), 20), (np.float64(0.1), 0.1)):
        assert torch.equal(attend(given), attend(number))
