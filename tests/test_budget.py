"""Budget: what is refused, and shares at their edges."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fasa_flex.budget import Budget


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
    with pytest.raises(ValueError, match=named) as error:
        Budget(**fields)
    assert "\n" not in str(error.value)


def test_forced_tokens_may_fill_the_budget_or_exceed_a_share() -> None:
    assert Budget(7, n_sink=3, n_recent=4).of(torch.tensor([9])).tolist() == [7]
    assert Budget(0.1, n_sink=3, n_recent=4).of(torch.tensor([10])).tolist() == [1]
    assert Budget(1).n_sink == Budget(1).n_recent == 0


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
