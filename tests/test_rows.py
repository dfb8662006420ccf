"""take_rows, dot_rows and weigh_rows: the selected rows and what attention makes of them, wherever the rows lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.backends.gather import dot_rows, take_rows, weigh_rows, whole_buffer

LENGTH, DIM = 9, 4


def states(layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers [2, 3, LENGTH, DIM] that lie in memory as caches and models leave them."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 3, 12, DIM, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return whole[1:, :, :LENGTH].contiguous()
    if layout == "first slots of a buffer":
        return whole[1:, :, :LENGTH]
    if layout == "last slots of a buffer":
        return whole[1:, :, 12 - LENGTH :]
    if layout.startswith("side by side"):  # keys and values of a token, as FASA-M has them
        first = DIM * layout.endswith("second")
        return torch.cat([whole, whole], dim=3)[1:, :, :LENGTH, first : first + DIM]
    return whole[1:, :, :LENGTH].transpose(1, 2).contiguous().transpose(1, 2)  # by token, as projections leave them


BUFFERS = ["first slots of a buffer", "side by side, first", "side by side, second"]
LAYOUTS = ["contiguous", *BUFFERS, "last slots of a buffer", "by token"]


def slots() -> Tensor:
    return torch.randint(LENGTH, (2, 3, 2, 2, 5), generator=torch.Generator().manual_seed(1))


def expected_rows(held: Tensor) -> Tensor:
    index = slots().flatten(2, 3)[..., None].expand(-1, -1, -1, -1, DIM)
    rows = held[:, :, None].expand(-1, -1, 4, -1, -1).gather(3, index)
    return rows.reshape(2, 12, 5, DIM)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_slots(layout: str) -> None:
    held = states(layout)
    assert torch.equal(take_rows(held, slots()), expected_rows(held))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighed_rows_are_their_sums_and_have_gradients(layout: str) -> None:
    held = states(layout).requires_grad_()
    weights = torch.rand(2, 12, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(weigh_rows(weights, held, slots()), weights @ expected_rows(held))
    assert torch.autograd.gradcheck(lambda w, h: weigh_rows(w, h, slots()), (weights, held))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sum_is_of_a_table_with_gaps(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would copy all of it, for a few rows."""
    tables = []
    real = F.embedding_bag
    monkeypatch.setattr(F, "embedding_bag", lambda *call, **options: tables.append(call[1]) or real(*call, **options))
    weigh_rows(torch.rand(2, 12, 3, 5, dtype=torch.float64), states(layout), slots())
    assert [table.is_contiguous() for table in tables] == [True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_buffer_is_found_from_its_first_slots(layout: str) -> None:
    held = states(layout)
    whole = whole_buffer(held)
    assert whole.data_ptr() == held.data_ptr()
    assert whole.shape == (2, 3, 12 if layout in BUFFERS else LENGTH, DIM)
    assert torch.equal(whole[:, :, :LENGTH], held)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dot_products_are_summed_in_single_precision_or_better_compiled_too(dtype: torch.dtype) -> None:
    held, query = states("first slots of a buffer", dtype), torch.randn(2, 12, 3, DIM).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = query.to(wide) @ expected_rows(held).to(wide).mT

    def products(query: Tensor, held: Tensor, slots: Tensor) -> Tensor:
        return dot_rows(query, take_rows(held, slots))

    for call in (products, torch.compile(products, fullgraph=True)):
        found = call(query, held, slots())
        assert found.dtype == wide
        torch.testing.assert_close(found, expected)
