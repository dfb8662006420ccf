"""Boundary: slots before it are dense, behind it sparse, and padding is not counted."""

from __future__ import annotations

import pytest
import torch
from sentences import raises_sentence
from torch import Tensor

from fasa_flex.hf.boundary import Boundary

CPU = torch.device("cpu")


def test_queries_behind_the_start_written_out() -> None:
    """Queries at slots 3..6; row 0 is sparse from 5 on, row 1 from 2 on."""
    boundary = Boundary.of(torch.tensor([5, 2]), None)
    assert boundary.behind(3, 4, CPU).int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert boundary.lowest == 2
    assert boundary.counted(3, 4, CPU) is None


def test_queries_that_are_counted_written_out() -> None:
    boundary = Boundary.of(torch.tensor([5, 2]), torch.tensor([6, 3]))
    counted = boundary.counted(3, 4, CPU)
    assert counted is not None
    assert counted.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]


def test_one_start_serves_every_row_and_another_number_does_not() -> None:
    assert Boundary.of(torch.tensor([4]), None).behind(3, 2, CPU).int().tolist() == [[0, 1]]
    Boundary.of(torch.tensor([4]), None).check_rows(3)
    with raises_sentence(ValueError, match="start names 2 rows, the batch has 3"):
        Boundary.of(torch.tensor([4, 4]), None).check_rows(3)


@pytest.mark.parametrize(
    ("start", "stop", "named"),
    [
        (torch.tensor([-1]), None, "start"),
        (torch.tensor([1.0]), None, "start"),
        (torch.tensor(1), None, "start"),
        (torch.tensor([1]), torch.tensor([2, 3]), "stop"),
        (torch.tensor([1]), torch.tensor([-2]), "stop"),
    ],
    ids=["negative", "float", "scalar", "rows", "negative stop"],
)
def test_what_is_no_slot_is_refused(start: Tensor, stop: Tensor | None, named: str) -> None:
    with raises_sentence(ValueError, match=f"{named} must be non-negative int64 slots"):
        Boundary.of(start, stop)
