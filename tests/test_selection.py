"""select: budgets, validity, forced tokens, ties, against the oracle's sets."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import oracle
import pytest
import torch

from fasa_flex.core import selection
from fasa_flex.core.budget import Budget
from fasa_flex.core.selection import Marks, running_count, select, valid_keys
from fasa_flex.model.visible import Visible

CPU = torch.device("cpu")


def test_valid_keys_are_causal_and_real_written_out() -> None:
    mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert valid_keys(2, 4, mask, CPU).int().flatten(0, 3).tolist() == [
        [0, 1, 1, 0],
        [0, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
    ]
    assert valid_keys(3, 4, None, CPU).int().flatten(0, 3).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("n_fac", [1, 7, 10_000, 1.0, 0.5, 0.25, 0.1, 0.07, 0.3, 1 / 32, 0.7, 0.9, 1e-9])
def test_budget_is_the_smaller_of_wanted_and_valid(n_fac: float) -> None:
    n_valid = torch.arange(0, 2049)
    expected = [oracle.budget(n_fac, n) for n in n_valid.tolist()]
    assert Budget(n_fac).of(n_valid).tolist() == expected


@pytest.mark.parametrize(("share", "keys"), [(0.07, 100), (0.14, 50), (0.28, 25), (0.55, 100), (0.1, 30), (0.29, 100)])
def test_a_share_means_the_number_that_was_written(share: float, keys: int) -> None:
    """7 % of 100 keys are 7, although 0.07 * 100 is 7.000000000000001."""
    assert Budget(share).of(torch.tensor([keys])).tolist() == [ceil(Fraction(repr(share)) * keys)]


@pytest.mark.parametrize(("n_sink", "n_recent"), [(0, 0), (2, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("n_fac", [5, 12, 0.4])
def test_slots_count_and_mask_equal_the_oracle(n_fac: float, n_sink: int, n_recent: int) -> None:
    scores = torch.randint(-4, 5, (2, 2, 3, 4, 20), generator=torch.Generator().manual_seed(1)).float()
    mask = torch.arange(20) >= torch.tensor([[0], [3]])
    selection = select(scores, valid_keys(4, 20, mask, CPU), Budget(n_fac, n_sink, n_recent))
    for b, h, g, i in torch.cartesian_prod(*map(torch.arange, scores.shape[:4])).tolist():
        valid = oracle.valid_keys(20 - 4 + i, mask[b].tolist())
        expected = oracle.select(scores[b, h, g, i].numpy(), valid, n_fac, n_sink, n_recent)
        count = int(selection.count[b, 0, 0, i])
        assert count == len(expected)
        assert sorted(selection.slots[b, h, g, i, :count].tolist()) == expected
        assert selection.mask[b, h, g, i].nonzero().flatten().tolist() == expected


def test_infinite_scores_rank_and_do_not_confuse_validity() -> None:
    """-inf for a valid key is a low score, not padding; +inf wins."""
    scores = torch.tensor([-torch.inf, 1.0, torch.inf, 0.0, torch.inf]).view(1, 1, 1, 1, 5)
    mask = torch.tensor([[True, True, True, True, False]])
    for n_fac, expected in ((1, [2]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])):
        selection = select(scores, valid_keys(1, 5, mask, CPU), Budget(n_fac))
        assert selection.mask.flatten().nonzero().flatten().tolist() == expected


def test_close_scores_are_told_apart_down_to_float32() -> None:
    step = torch.finfo(torch.float32).eps
    scores = (1.0 + step * torch.tensor([0.0, 3.0, 1.0, 2.0])).view(1, 1, 1, 1, 4)
    selection = select(scores, valid_keys(1, 4, None, CPU), Budget(2))
    assert sorted(selection.slots.flatten().tolist()) == [1, 3]


def test_a_selection_does_not_change() -> None:
    selection = select(torch.zeros(1, 1, 1, 1, 4), valid_keys(1, 4, None, CPU), Budget(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        selection.slots = selection.slots + 1


@pytest.mark.parametrize("n_fac", [3, 0.75])
def test_a_row_without_valid_keys_takes_none(n_fac: float) -> None:
    valid = torch.tensor([[False] * 4, [False, True, False, False]]).view(2, 1, 1, 1, 4)
    selection = select(torch.ones(2, 1, 1, 1, 4), valid, Budget(n_fac))
    assert selection.count.expand(2, 1, 1, 1).flatten().tolist() == [0, 1]
    assert selection.mask.flatten(0, 3).int().tolist() == [[0] * 4, [0, 1, 0, 0]]
    assert selection.slots.min() >= 0
    assert selection.slots.max() < 4
    assert set(selection.slots[1].flatten().tolist()) == {1}


@pytest.mark.parametrize(("n_sink", "n_recent"), [(0, 0), (1, 2)])
@pytest.mark.parametrize("shared", [1, 3])
def test_every_head_takes_its_own_count(n_sink: int, n_recent: int, shared: int) -> None:
    """Queries with 12 to 16 keys: head 0 is over its budget, head 1 sometimes, head 2 never; row 1 is padded."""
    scores = torch.randint(-4, 5, (2, 3, shared, 5, 16), generator=torch.Generator().manual_seed(2)).float()
    mask = torch.arange(16) >= torch.tensor([[0], [3]])
    counts = (4, 13, 16)
    selection = select(scores, valid_keys(5, 16, mask, CPU), Budget(counts, n_sink, n_recent))
    for b, h, g, i in torch.cartesian_prod(*map(torch.arange, scores.shape[:4])).tolist():
        valid = oracle.valid_keys(16 - 5 + i, mask[b].tolist())
        expected = oracle.select(scores[b, h, g, i].numpy(), valid, counts[h], n_sink, n_recent)
        assert int(selection.count[b, h, g, i]) == len(expected)
        taken = selection.slots[b, h, g, i][selection.taken[b, h, g, i]]
        assert sorted(taken.tolist()) == expected
        assert selection.mask[b, h, g, i].nonzero().flatten().tolist() == expected


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_selects_the_same() -> None:
    scores = torch.randint(-4, 5, (2, 3, 1, 2, 43), generator=torch.Generator().manual_seed(2)).float()
    mask = torch.arange(43) >= torch.tensor([[0], [39]])
    valid = valid_keys(2, 43, mask, CPU)

    def mask_of(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return select(scores, valid, Budget(7, 1, 2)).mask

    assert torch.equal(torch.compile(mask_of, fullgraph=True)(scores, valid), mask_of(scores, valid))


@pytest.mark.parametrize(("kv_len", "free"), [(1, 0), (5, 95), (33, 31), (64, 200), (100, 156)])
def test_marks_with_room_are_those_of_keys_with_free_slots(kv_len: int, free: int) -> None:
    """Of one size whatever part of a buffer is written, so that a step is compiled for the buffer alone."""
    mask = torch.arange(kv_len)[None] >= kv_len // 4
    valid = valid_keys(1, kv_len, mask, CPU)
    expected = Marks.of(torch.nn.functional.pad(valid, (0, free)), Budget(8, n_sink=2, n_recent=1), samples=True)
    got = Marks.of(valid, Budget(8, n_sink=2, n_recent=1), samples=True).with_room(kv_len, free)
    assert got.forced is not None
    assert expected.forced is not None
    assert got.sample is not None
    assert expected.sample is not None
    assert torch.equal(got.forced, expected.forced)
    assert torch.equal(got.sample.sort().values, expected.sample.sort().values)
    assert Marks(None, None).with_room(kv_len, free) == Marks(None, None)


@pytest.mark.parametrize("kv_len", [1, 511, 512, 2000])
def test_a_count_by_pieces_is_a_running_count(kv_len: int) -> None:
    """On a GPU rows of more than 16384 keys are counted so."""
    valid = torch.rand(3, 1, 1, 1, kv_len, generator=torch.Generator().manual_seed(kv_len)) > 0.4
    got = selection._count_by_pieces(valid)
    assert got.is_contiguous()
    assert torch.equal(got, running_count(valid))


@pytest.mark.parametrize("forced", [0, 2])
def test_marks_of_one_query_as_bytes(forced: int) -> None:
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, [0, 3]] = False
    marks = Marks.of(valid_keys(1, 21, mask, CPU), Budget(8, forced, forced), samples=False)
    assert marks.bytes is not None
    assert marks.bytes.shape == (2, 1, 1, 1, 32)
    plain, ends = [1] * 21 + [0] * 11, [3] * forced
    assert marks.bytes[0].flatten().tolist() == ends + plain[forced : 21 - forced] + ends + [0] * 11
    gaps = [0, *ends, 0, *plain[2 + forced : 21 - forced], *ends] if forced else [0, 1, 1, 0, *plain[4:21]]
    assert marks.bytes[1].flatten().tolist() == gaps + [0] * 11
    assert Marks.of(valid_keys(2, 21, mask, CPU), Budget(8, forced, forced), samples=False).bytes is None


def test_a_step_counts_its_keys_once_and_only_for_marks_that_depend_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's settings force and sample nothing."""
    counted = []
    monkeypatch.setattr("fasa_flex.hf.masks.running_count", lambda valid: counted.append(1) or running_count(valid))
    visible = Visible(torch.rand(2, 1, 1, 21, generator=torch.Generator().manual_seed(0)) > 0.2, (2, 1, 21), CPU)
    assert visible.decoding(Budget(8), samples=False).marks is not None
    assert not counted
    marks = visible.decoding(Budget(8, 2, 2), samples=True).marks
    expected = Marks.of(visible.valid(), Budget(8, 2, 2), samples=True)
    assert marks is not None
    assert all(torch.equal(mine, own) for mine, own in zip(marks, expected, strict=True))  # type: ignore[arg-type]  # none is None
    visible.last()
    assert len(counted) == 1
