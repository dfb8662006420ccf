"""rank_keys: float32 order as distinct integers, ties to the lower slot."""

from __future__ import annotations

import oracle
import pytest
import torch

from fasa_flex.core import ranking
from fasa_flex.core.ranking import INVALID, largest, rank_keys

INF, TINY = torch.inf, 1e-45  # the smallest subnormal of float32


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ([1.0, 3.0, 2.0], [1, 2, 0]),
        ([-1.0, -3.0, -2.0], [0, 2, 1]),
        ([0.0, -0.0, 0.0], [0, 1, 2]),
        ([-0.0, 0.0, TINY, -TINY], [2, 0, 1, 3]),
        ([-INF, INF, 0.0, 3e38, -3e38], [1, 3, 2, 4, 0]),
        ([5.0] * 6, [0, 1, 2, 3, 4, 5]),
        ([1.0, torch.nan, INF], [1, 2, 0]),  # NaN is selected and shows, instead of hiding
        ([-torch.nan, 1.0, torch.nan, INF], [0, 2, 3, 1]),  # whatever its sign
    ],
    ids=str,
)
def test_orders_written_out(scores: list[float], order: list[int]) -> None:
    assert rank_keys(torch.tensor(scores)).topk(len(scores)).indices.tolist() == order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 17, 300])
def test_long_rows_with_many_ties_equal_the_oracle(dtype: torch.dtype, count: int) -> None:
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4).to(dtype)
    slots = rank_keys(scores).topk(count).indices
    for row in range(3):
        assert slots[row].tolist() == oracle.top(scores[row].double().numpy(), range(300), count)


@pytest.mark.parametrize("number", [1.0, 2.0, 3.0, 1024.5, 1e30, 1e-30, -1.0, -2.0, -3.0, -1024.5, -1e30, -1e-30])
def test_neighbouring_numbers_are_told_apart(number: float) -> None:
    """The last bit of the mantissa counts, whatever sign and exponent."""
    middle = torch.tensor(number)
    scores = torch.stack(
        [torch.nextafter(middle, torch.tensor(INF)), middle, torch.nextafter(middle, -torch.tensor(INF))]
    )
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert rank_keys(scores[order]).argsort(descending=True).tolist() == [order.index(slot) for slot in range(3)]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_the_same_order() -> None:
    """Numbers of all kinds in vectors and behind the last whole one; subnormal ones are told apart too."""
    kinds = torch.tensor([0.0, -0.0, TINY, -TINY, INF, -INF, torch.nan, -torch.nan, 1.0, -1.0, 3e38, -3e38])
    scores = kinds[torch.randint(len(kinds), (2, 75), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(torch.compile(rank_keys, fullgraph=True)(scores), rank_keys(scores))


@pytest.mark.parametrize("by", ["NumPy", "NumPy by two rows", "NumPy by rows", "torch"])
@pytest.mark.parametrize("count", [1, 16, 99, 100])
def test_the_largest_are_those_of_a_sort(by: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either library, for rows that do not lie one behind the other too; what may not be selected repeats."""
    monkeypatch.setattr(ranking, "_WORTH", 1000)  # threads, or a machine with many would leave all to torch
    if by in ("NumPy by two rows", "NumPy by rows"):
        monkeypatch.setattr(ranking, "_GRAIN", 299 if by == "NumPy by two rows" else 99)  # numbers; a row has 100
    if by == "torch":
        monkeypatch.setattr(ranking, "_WORTH", 0)
        monkeypatch.setattr(ranking, "_GRAIN", 1)
        monkeypatch.setattr(torch.Tensor, "numpy", None)
    scores = torch.randn(3, 100, 2, 1, generator=torch.Generator().manual_seed(0)).transpose(1, 3)
    order = torch.where(torch.arange(100) % 3 > 0, rank_keys(scores), INVALID)
    before = order.clone()
    found = largest(order, count)
    assert found.shape == (3, 1, 2, count)
    assert found.sort(-1).values.equal(order.sort(-1).values[..., 100 - count :])
    assert order.equal(before)
    torch.library.opcheck(torch.ops.fasa_flex.largest.default, (order, count))


def in_order(order: torch.Tensor) -> torch.Tensor:
    """By value, for a comparison of unsorted results."""
    return order.sort(-1).values


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("length", [1023, 1024, 1100])
def test_long_rows_are_searched_by_tiles_of_tiles(length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winners may lie in one tile, or be as many as the valid keys; no search is among all keys."""
    searched, partition = [], ranking._partition
    monkeypatch.setattr(ranking, "_partition", lambda order, wanted: searched.append(order) or partition(order, wanted))
    scores = torch.randn(3, length, generator=torch.Generator().manual_seed(0)).mul(4).round()
    scores[1, 1000:1010] = 50.0
    order = torch.where(torch.arange(length) % 3 > 0, rank_keys(scores), INVALID)
    order[2, :-2] = INVALID
    assert in_order(largest(order, count)).equal(in_order(order)[:, length - count :])
    levels = {1: 3, 2: 3, 5: 2}[count]
    assert len(searched) == levels
    assert max(row.shape[-1] for row in searched) < 2 * ranking.TILE * max(count, 16)


@pytest.mark.parametrize("count", [1, 17, 99, 100])
@pytest.mark.parametrize("row", [99, 100])
def test_counting_finds_what_a_sort_finds(count: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph for a GPU does: all kinds of numbers, many ties, fewer valid keys than wanted, forced keys."""
    monkeypatch.setattr(ranking, "_ROW", row)  # a longer row goes to topk
    kinds = torch.tensor([0.0, -0.0, TINY, -TINY, INF, -INF, torch.nan, 1.0, -1.0, 3e38, -3e38])
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat(
        [torch.randn(3, 100, generator=generator), kinds[torch.randint(11, (3, 100), generator=generator)]]
    )
    first = torch.arange(100) < 7
    order = torch.where(torch.arange(100) % 3 > 0, rank_keys(scores, first), INVALID)
    order[1] = INVALID
    found = ranking._by_counts(order, count)
    assert in_order(found).equal(in_order(order)[:, 100 - count :])
    if row == 100:
        slots = ranking.slot_of(found, 100).masked_fill(found == INVALID, 100)
        assert (slots.diff(dim=-1)[found[:, 1:] > INVALID] != 0).all()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("valid", [1.0, 0.5, 0.003])
def test_tiles_and_counts_send_ties_to_the_lower_slot(
    count: int, valid: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of up to 64 are counted, which takes them by ascending slot; candidates of 5 tiles and more are not."""
    monkeypatch.setattr(ranking, "_ROW", 64)
    generator = torch.Generator().manual_seed(0)
    for length in (64, 65, 1100, 1500):
        scores = torch.randint(3, (3, length), generator=generator).float()
        order = torch.where(torch.rand(3, length, generator=generator) < valid, rank_keys(scores), INVALID)
        assert in_order(ranking._by_tiles_and_counts(order, count)).equal(in_order(order)[:, length - count :])


@pytest.mark.parametrize("count", [1, 300, 8192])
def test_counts_of_the_longest_row_do_not_run_into_each_other(count: int) -> None:
    """All scores reach all three thresholds of a step, or half of them do."""
    scores = torch.full((2, ranking._ROW), 3.0)
    scores[1, ::2] = -3.0
    order = rank_keys(scores)
    assert in_order(ranking._by_counts(order, count)).equal(in_order(order)[:, ranking._ROW - count :])


def test_numbers_beyond_the_last_are_where_it_is_reached() -> None:
    """Wanted numbers differ by row, or a GPU's graph does not compile (test_torch_workarounds.py)."""
    number = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.int32)
    assert ranking.where_reached(number, 4).tolist() == [[1, 3, 4, 4], [2, 2, 2, 2], [0, 0, 0, 0]]


def test_tiles_hold_the_keys_in_order() -> None:
    tiles = ranking.in_tiles(torch.arange(35), -1)
    assert tiles.shape == (3, 16)
    assert tiles.flatten().tolist() == [*range(35), *[-1] * 13]
