"""Budgets, rankings and selections on arbitrary scores and validity: infinities, ties, holes, windows, empty rows."""

from __future__ import annotations

import math

import numpy as np
import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import budgets as some_budgets
from properties.calls import cases, masks
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.ranking import rank_keys
from fasa_flex.core.selection import select, valid_keys

CPU = torch.device("cpu")
INF, TINY = math.inf, 1e-45
shares = st.floats(1e-6, 1.0, exclude_min=True).map(lambda share: round(share, 6)).filter(lambda share: 0 < share <= 1)
budgets = st.integers(1, 5000) | shares
numbers = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, TINY, -TINY, INF, -INF])


@cases(1)
@given(budgets, st.lists(st.integers(0, 100_000), min_size=1, max_size=20))
def test_budget_equals_the_oracle(n_fac: float, n_valid: list[int]) -> None:
    assert Budget(n_fac).of(torch.tensor(n_valid)).tolist() == [oracle.budget(n_fac, n) for n in n_valid]


@cases(1)
@given(budgets, st.integers(1, 5000))
def test_the_widest_budget_is_that_of_the_whole_cache(n_fac: float, length: int) -> None:
    assert Budget(n_fac).widest(length) == int(Budget(n_fac).of(torch.arange(length + 1)).max())


@cases(1)
@given(st.lists(numbers, min_size=1, max_size=40), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_ranking_is_that_of_the_numbers(scores: list[float], dtype: torch.dtype) -> None:
    """Distinct integers, from the highest number down, ties from the lower slot up; 0.0 and -0.0 tie."""
    tensor = torch.tensor(scores).to(dtype)
    ranks = rank_keys(tensor)
    assert ranks.dtype == torch.int64
    assert len(set(ranks.tolist())) == len(scores)
    numbers = tensor.double().tolist()
    assert ranks.argsort(descending=True).tolist() == sorted(
        range(len(scores)), key=lambda slot: (-numbers[slot], slot)
    )


@cases(0.5)
@given(st.lists(st.tuples(numbers | st.just(math.nan), st.booleans()), min_size=1, max_size=40))
def test_what_comes_first_does_so_whatever_its_score(scored: list[tuple[float, bool]]) -> None:
    """The first ones by slot, then NaN, then the numbers."""
    scores, first = zip(*scored, strict=True)
    ranks = rank_keys(torch.tensor(scores), first=torch.tensor(first))

    def place(slot: int) -> tuple[bool, bool, float, int]:
        nan = math.isnan(scores[slot])
        return (not first[slot], not nan, 0.0 if nan or first[slot] else -scores[slot], slot)

    expected = sorted(range(len(scores)), key=lambda slot: (not first[slot], slot) if first[slot] else place(slot))
    assert ranks.argsort(descending=True).tolist() == expected


@st.composite
def scores_and_valid(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores [B, H, G, Q, T] with many ties or infinities and any validity [B or 1, 1, 1, Q, T]."""
    batch, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 24))
    queries = draw(st.integers(1, min(length, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = (batch, heads, group, queries, length)
    kind = draw(st.sampled_from(["equal", "ties", "continuous", "infinite", "extreme"]))
    scores = torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "equal":
        scores = torch.full(shape, draw(numbers))
    elif kind == "continuous":
        scores = torch.randn(shape, generator=generator)
    elif kind == "infinite":
        scores = torch.where(scores.abs() == 2, scores * INF, scores)
    elif kind == "extreme":
        levels = torch.tensor([-3e38, -TINY, -0.0, TINY, 3e38])
        scores = levels[scores.long() + 2]
    if draw(st.booleans()):
        valid = valid_keys(queries, length, draw(masks(batch, length)), CPU)
    else:  # any pattern at all, such as a window
        rows = draw(st.sampled_from([1, batch]))
        valid = torch.rand(rows, 1, 1, queries, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    return scores.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))), valid


@cases(2.5)
@given(scores_and_valid(), st.data())
def test_selection_equals_the_oracle(inputs: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Slots, count and mask say the same; slots that do not count repeat one that does."""
    scores, valid = inputs
    options = data.draw(some_budgets(scores.shape[-1]))
    selection = select(scores, valid, Budget(**options))
    width = Budget(**options).widest(scores.shape[-1])
    assert selection.slots.shape == (*scores.shape[:-1], width)
    assert selection.mask.shape == scores.shape
    assert not (selection.mask & ~valid).any()
    taken, counts = selection.taken.expand(selection.slots.shape), selection.count.expand(scores.shape[:-1])
    for index in np.ndindex(*scores.shape[:-1]):
        b, _, _, i = index
        keys = valid[min(b, len(valid) - 1), 0, 0, i].nonzero().flatten().tolist()
        expected = oracle.select(scores[index].double().numpy(), keys, **options)
        assert int(counts[index]) == len(expected)
        assert selection.mask[index].nonzero().flatten().tolist() == expected
        assert selection.slots[index][taken[index]].sort().values.tolist() == expected
        others = selection.slots[index][~taken[index]].tolist()
        assert set(others) <= set(expected or range(scores.shape[-1]))


@cases(1)
@given(scores_and_valid(), st.data())
def test_only_the_order_of_valid_scores_counts(inputs: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """A growing function of the scores selects the same; scores of invalid keys may be anything."""
    scores, valid = inputs
    budget = Budget(**data.draw(some_budgets(scores.shape[-1])))
    places = torch.unique(scores.float(), sorted=True, return_inverse=True)[1].float() - 7
    spoiled = torch.where(valid, places, data.draw(st.sampled_from([INF, -INF, 1e9, math.nan])))
    assert select(spoiled, valid, budget).mask.equal(select(scores, valid, budget).mask)


@cases(0.5)
@given(st.integers(1, 30), st.data())
def test_valid_keys_equal_the_oracle(length: int, data: st.DataObject) -> None:
    queries, batch = data.draw(st.integers(1, length)), data.draw(st.integers(1, 3))
    mask = data.draw(masks(batch, length))
    valid = valid_keys(queries, length, mask, CPU)
    assert valid.shape == (1 if mask is None else batch, 1, 1, queries, length)
    for b in range(len(valid)):
        for i in range(queries):
            expected = oracle.valid_keys(length - queries + i, None if mask is None else mask[b].tolist())
            assert valid[b, 0, 0, i].nonzero().flatten().tolist() == expected
