"""contextual_agreement: a worked example, the oracle, and who is left out."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from families import Family
from torch import Tensor

from fasa_flex import RotaryLayout, contextual_agreement
from fasa_flex.calibration import agreement
from fasa_flex.core import pieces


def integers(*shape: int, seed: int = 0, limit: int = 3) -> Tensor:
    """Small whole numbers: every score is exact in float32, and ties are common."""
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_four_keys_four_dimensions_written_out() -> None:
    """Half-split planes of a 4-dimensional head: chunk 0 is dims (0, 2), chunk 1 is dims (1, 3).

    key      chunk 0    chunk 1    both
    0        1          0          1
    1        3          0          3
    2        0          5          5
    3        2          1          3        top-2 of both: {2, 1}, as key 1 precedes key 3 in their tie
                                            top-2 of chunk 0: {1, 3}; of chunk 1: {2, 3} -> 1/2 and 1/2
    """
    q = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]]]])
    k = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 3.0], [2.0, 0.0, 0.0, 1.0]]]])
    layout = RotaryLayout.half_split(4)
    assert contextual_agreement(q, k, layout, top_k=2).tolist() == [[0.5, 0.5]]
    assert contextual_agreement(q, k, layout, top_k=1).tolist() == [[0.0, 1.0]]
    assert contextual_agreement(q, k, layout, top_k=4).tolist() == [[1.0, 1.0]]
    # top-3: both {2, 1, 3}; chunk 0 {1, 3, 0}; chunk 1 {2, 3, 0}, key 0 before key 1 at 0
    assert contextual_agreement(q, k, layout, top_k=3).tolist() == [[torch.tensor(2 / 3).item()] * 2]


def test_planes_are_the_layouts_planes() -> None:
    """The same tensors read with interleaved planes, (0, 1) and (2, 3), agree differently."""
    q = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]]]])
    k = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 3.0], [2.0, 0.0, 0.0, 1.0]]]])
    # chunk (0, 1): 1 1 2 2; chunk (2, 3): 0 2 3 1; both: 1 3 5 3 -> top-2 {2, 1}, {2, 3}, {2, 1}
    assert contextual_agreement(q, k, RotaryLayout.interleaved(4), top_k=2).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize(
    "layout", [RotaryLayout.half_split(8), RotaryLayout.interleaved(8), RotaryLayout.half_split(8, 4)]
)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "top_k"), [(1, 4, 2, 3, 5), (2, 3, 1, 6, 2), (1, 2, 2, 1, 7)]
)
def test_equals_the_oracle(
    layout: RotaryLayout, batch: int, heads: int, kv_heads: int, queries: int, top_k: int
) -> None:
    q, k = integers(batch, heads, queries, 8, seed=1), integers(batch, kv_heads, 20, 8, seed=2)
    table = contextual_agreement(q, k, layout, top_k=top_k)
    expected = oracle.contextual_agreement(q.numpy(), k.numpy(), layout.chunks.tolist(), top_k)
    assert table.shape == (heads, 4)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ranked_by_its_exact_scores(dtype: torch.dtype) -> None:
    """Scores of several thousand: bfloat16 keeps steps of 16 there, and a score rounded to it would tie."""
    q, k = integers(1, 2, 3, 16, seed=1, limit=32), integers(1, 2, 40, 16, seed=2, limit=32)
    layout = RotaryLayout.half_split(16)
    expected = oracle.contextual_agreement(q.numpy(), k.numpy(), layout.chunks.tolist(), 9)
    table = contextual_agreement(q.to(dtype), k.to(dtype), layout, top_k=9)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


def test_queries_with_fewer_than_top_k_keys_are_left_out() -> None:
    """Ten queries over ten keys with K = 7: the first six see too few keys; their q changes nothing."""
    layout = RotaryLayout.half_split(8)
    q, k = integers(1, 2, 10, 8, seed=3), integers(1, 2, 10, 8, seed=4)
    table = contextual_agreement(q, k, layout, top_k=7)
    changed = q.clone()
    changed[:, :, :6] = integers(1, 2, 6, 8, seed=5)
    assert torch.equal(contextual_agreement(changed, k, layout, top_k=7), table)
    assert torch.equal(contextual_agreement(q[:, :, 6:], k, layout, top_k=7), table)
    assert table.min() < 1  # left out, not counted as 1
    changed[:, :, 7] = integers(1, 2, 8, seed=6)
    assert not torch.equal(contextual_agreement(changed, k, layout, top_k=7), table)


def test_no_query_with_enough_keys_is_an_error() -> None:
    with pytest.raises(ValueError, match="9") as error:
        contextual_agreement(integers(1, 2, 4, 8), integers(1, 2, 8, 8), RotaryLayout.half_split(8), top_k=9)
    assert "top_k" in str(error.value)


def test_scores_of_all_chunks_sum_to_the_full_score(family: Family) -> None:
    """The decomposition behind the method, for the layout of every family."""
    layout = RotaryLayout(torch.tensor(family.pairs), (family.rotary_dim or family.head_dim) // 2)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(5, layout.chunks.numel(), generator=generator),
        torch.randn(9, layout.chunks.numel(), generator=generator),
    )
    terms = torch.einsum("qcp,kcp->cqk", q.double()[:, layout.chunks], k.double()[:, layout.chunks])
    torch.testing.assert_close(terms.sum(0), q.double() @ k.double().T)


def test_a_head_with_one_chunk_agrees_with_itself() -> None:
    q, k = integers(1, 2, 3, 2, seed=7), integers(1, 1, 12, 2, seed=8)
    assert contextual_agreement(q, k, RotaryLayout.half_split(2), top_k=4).tolist() == [[1.0], [1.0]]


def test_scale_and_other_heads_do_not_matter() -> None:
    """CA ranks raw dot products: scaling all keys of a head, or permuting heads with their keys, changes no entry."""
    layout = RotaryLayout.half_split(8)
    q, k = integers(1, 4, 3, 8, seed=9), integers(1, 2, 16, 8, seed=10)
    table = contextual_agreement(q, k, layout, top_k=5)
    assert torch.equal(contextual_agreement(q, 4 * k, layout, top_k=5), table)
    swapped = contextual_agreement(q[:, [2, 3, 0, 1]], k[:, [1, 0]], layout, top_k=5)
    assert torch.equal(swapped, table[[2, 3, 0, 1]])


@pytest.mark.parametrize(
    ("q", "k", "top_k", "named"),
    [
        ((1, 3, 2, 8), (1, 2, 9, 8), 2, "3"),  # heads do not divide
        ((1, 2, 2, 8), (1, 2, 9, 6), 2, "6"),  # head dims differ
        ((1, 2, 2, 6), (1, 2, 9, 6), 2, "8"),  # not the layout's head dim
        ((2, 2, 2, 8), (1, 2, 9, 8), 2, "2"),  # batches differ
        ((1, 2, 10, 8), (1, 2, 9, 8), 2, "10"),  # more queries than keys
        ((2, 2, 8), (2, 9, 8), 2, r"(?i)b, hq|shape|\[2, 2, 8\]|\(2, 2, 8\)|4"),  # no batch dimension
        ((1, 2, 2, 8), (2, 2, 9, 8), 2, "2"),  # batches differ the other way
        ((1, 2, 8), (1, 2, 9, 8), 2, r"expected \[B, Hq"),  # queries without batch
        ((1, 2, 2, 8), (1, 9, 8), 2, r"expected \[B, Hq"),  # keys without batch
        ((1, 2, 2, 8, 3), (1, 2, 9, 8), 2, r"expected \[B, Hq"),
        ((1, 2, 2, 8), (1, 2, 9, 8, 3), 2, r"expected \[B, Hq"),
        ((1, 2, 2, 8), (1, 2, 9, 10), 2, r"expected \[B, Hq"),
        ((1, 2, 2, 10), (1, 2, 9, 10), 2, "the layout is for head_dim 8"),
        ((1, 2, 2, 8), (1, 0, 9, 8), 2, r"expected \[B, Hq"),  # no key heads
        ((1, 2, 0, 8), (1, 2, 9, 8), 2, r"expected \[B, Hq"),  # no queries
        ((1, 2, 2, 8), (1, 2, 9, 8), 0, "0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple[int, ...], k: tuple[int, ...], top_k: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        contextual_agreement(integers(*q), integers(*k), RotaryLayout.half_split(8), top_k=top_k)


@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_is_refused(where: str) -> None:
    q, k = integers(1, 2, 2, 8), integers(1, 2, 9, 8)
    (q if where == "q" else k)[0, 1, 1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"(?i)nan"):
        contextual_agreement(q, k, RotaryLayout.half_split(8), top_k=2)


def test_gradients_are_not_kept() -> None:
    q, k = integers(1, 2, 2, 8).requires_grad_(), integers(1, 2, 9, 8).requires_grad_()
    assert not contextual_agreement(q, k, RotaryLayout.half_split(8), top_k=2).requires_grad


def test_k_is_256_unless_told() -> None:
    q, k, layout = integers(1, 1, 40, 8, seed=1), integers(1, 1, 300, 8, seed=2), RotaryLayout.half_split(8)
    tables = [contextual_agreement(q, k, layout, top_k=top_k) for top_k in (255, 256, 257)]
    assert torch.equal(contextual_agreement(q, k, layout), tables[1])
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[2], tables[1])


def test_long_queries_are_taken_in_pieces_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queries at a time as their int64 scores fit, at least one, the same table for any size."""
    q, k, layout = integers(3, 4, 7, 8, seed=1), integers(3, 2, 11, 8, seed=2), RotaryLayout.half_split(8)
    whole = contextual_agreement(q, k, layout, top_k=3)
    sizes: list[int] = []
    hits = agreement._hits
    monkeypatch.setattr(agreement, "_hits", lambda query, *rest: (sizes.append(query.shape[2]), hits(query, *rest))[1])
    one = 8 * 3 * 4 * 11  # bytes of the scores of one query
    for limit, expected in ((1, [1] * 7), (3 * one - 1, [2, 2, 2, 1]), (3 * one, [3, 3, 1]), (7 * one, [7])):
        sizes.clear()
        monkeypatch.setattr(pieces, "_BYTES", limit)
        torch.testing.assert_close(contextual_agreement(q, k, layout, top_k=3), whole)
        assert sizes == expected
    monkeypatch.undo()
    assert pieces._BYTES > 1 << 20, "so that a table of a usual length is made in few pieces"
