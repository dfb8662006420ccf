"""fasa_attention: what is selected, what must not change the result, and what must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import DIM, EXACT, Case, integers, pick_chunks, plain_attention
from torch import Tensor
from torch.nn import functional as F

from fasa_flex import RotaryLayout

# What was selected, read off the result: with one-hot values the output is the attention weights themselves.


def selected(case: Case, backend: str, seed: int = 0) -> Tensor:
    """bool [B, Hq, Q, T]: the keys with weight; needs T <= DIM."""
    q, k, _, chunks = case.tensors(seed, torch.float64)
    v = torch.eye(case.length, DIM, dtype=torch.float64).expand(case.batch, case.kv_heads, -1, -1).contiguous()
    return case.run(q, k, v, chunks, backend)[..., : case.length] > 0


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("options", [{}, {"n_sink": 2, "n_recent": 1}, {"group_reduce": "none"}], ids=str)
@pytest.mark.parametrize("n_fac", [1, 4, 0.3, 0.5])
def test_selected_is_valid_and_of_the_right_size_and_holds_the_forced(
    backend: str, options: dict[str, Any], n_fac: float
) -> None:
    if not isinstance(n_fac, float) and n_fac < options.get("n_sink", 0) + options.get("n_recent", 0):
        options = {}
    case = Case(
        "sets", batch=4, queries=3, length=16, n_fac=n_fac, left=(0, 5, 0, 14), right=(0, 0, 4, 0), options=options
    )
    taken = selected(case, backend)
    mask = case.key_mask
    assert mask is not None
    for b in range(4):
        for i in range(3):
            valid = oracle.valid_keys(16 - 3 + i, mask[b].tolist())
            size = oracle.budget(n_fac, len(valid))
            forced = {*valid[: options.get("n_sink", 0)], *valid[len(valid) - options.get("n_recent", 0) :]}
            for h in range(4):
                slots = set(taken[b, h, i].nonzero().flatten().tolist())
                assert slots <= set(valid)
                assert len(slots) == size
                if len(forced) <= size:
                    assert forced <= slots


@pytest.mark.parametrize("backend", EXACT)
def test_forced_tokens_that_exceed_a_share_stay_inside_it(backend: str) -> None:
    """A share of few keys can be smaller than the forced tokens: the budget wins, and only forced tokens are in."""
    case = Case("share", length=16, queries=16, n_fac=0.125, options={"n_sink": 2, "n_recent": 2})
    taken = selected(case, backend)
    for i in range(16):
        valid = list(range(i + 1))
        for h in range(4):
            slots = set(taken[0, h, i].nonzero().flatten().tolist())
            assert len(slots) == oracle.budget(0.125, len(valid))
            assert slots <= {*valid[:2], *valid[-2:]}


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("left", "expected"), [(0, [0, 1, 2]), (6, [6, 7, 8])])
def test_equal_scores_go_to_the_lower_index(backend: str, left: int, expected: list[int]) -> None:
    case = Case("ties", length=16, n_fac=3, left=(left,))
    _, _, _, chunks = case.tensors()
    q, k = torch.ones(1, 4, 1, DIM), torch.ones(1, 2, 16, DIM)
    v = torch.eye(16).expand(1, 2, -1, -1)
    out = case.run(q, k, v, chunks, backend)
    for h in range(4):
        assert out[0, h, 0].nonzero().flatten().tolist() == expected
    torch.testing.assert_close(out[out > 0], torch.full((12,), 1 / 3))


@pytest.mark.parametrize("backend", EXACT)
def test_positive_and_negative_zero_are_a_tie(backend: str) -> None:
    """Scores 0.0 and -0.0 are equal numbers with different bits."""
    q = torch.zeros(1, 1, 1, DIM)
    k = torch.ones(1, 1, 16, DIM)
    k[:, :, :4] = -1.0  # 0 * -1 is -0.0: the first four keys score -0.0 in every dimension
    out = plain_attention(q, k, torch.eye(16)[None, None], pick_chunks(1, 2), n_fac=3, backend=backend)
    assert out.flatten().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", EXACT)
def test_scores_only_rank_and_are_no_weights(backend: str) -> None:
    """Chunk 0 picks keys 1 and 2; the weights come from all dimensions."""
    q, k = torch.zeros(1, 1, 1, DIM), torch.zeros(1, 1, 4, DIM)
    q[..., 0], q[..., 1] = 1.0, 1.0
    k[0, 0, :, 0] = torch.tensor([0.0, 3.0, 2.0, 1.0])
    k[0, 0, :, 1] = torch.tensor([9.0, -3.0, -2.0, 0.0])  # full logits: 9, 0, 0, 1
    v = torch.eye(4, DIM)[None, None]
    chunks = torch.tensor([[[0, 8]]])
    out = plain_attention(q, k, v, chunks, n_fac=2, scaling=1.0, backend=backend)
    torch.testing.assert_close(out[0, 0, 0, :4], torch.tensor([0.0, 0.5, 0.5, 0.0]))


# Contracts: what must not change the result, and what must.


@pytest.mark.parametrize("backend", EXACT)
def test_an_unselected_value_row_changes_nothing_and_a_selected_one_does(backend: str) -> None:
    case = Case("values", batch=2, queries=1, options={"group_reduce": "max"})
    q, k, v, chunks = case.tensors()
    chosen = case.oracle(q, k, v, chunks).selected
    before = case.run(q, k, v, chunks, backend)
    for b in range(2):
        for n in range(2):
            slots = set(chosen[b, 2 * n, 0])
            other = v.clone()
            other[b, n, [j for j in range(24) if j not in slots]] = 1e4
            assert torch.equal(case.run(q, k, other, chunks, backend), before)
            for j in slots:
                other = v.clone()
                other[b, n, j] += 1.0
                assert not torch.equal(case.run(q, k, other, chunks, backend), before)


@pytest.mark.parametrize("backend", EXACT)
def test_a_batch_equals_its_rows_alone(backend: str) -> None:
    case = Case("batch", batch=4, queries=3, left=(0, 3, 11, 20), n_fac=0.4, options={"n_recent": 1})
    q, k, v, chunks = case.tensors()
    together = case.run(q, k, v, chunks, backend)
    for b in range(4):
        row = replace(case, batch=1, left=(case.left[b],))
        alone = row.run(q[b : b + 1], k[b : b + 1], v[b : b + 1], chunks, backend)
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("n_fac", [5, 0.3])
def test_several_queries_equal_one_at_a_time(backend: str, n_fac: float) -> None:
    case = Case("queries", batch=2, queries=9, n_fac=n_fac, options={"n_sink": 1, "n_recent": 1})
    q, k, v, chunks = case.tensors()
    together = case.run(q, k, v, chunks, backend)
    for i in range(9):
        end = 24 - 9 + i + 1
        alone = case.run(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end], chunks, backend)
        torch.testing.assert_close(together[:, :, i : i + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
def test_padding_changes_nothing(backend: str, left: int, right: int) -> None:
    """Padding holds keys that would win every ranking and values that would show."""
    options = {"n_sink": 1, "n_recent": 2}
    case = Case("no padding", queries=4, options=options, n_fac=0.3)
    q, k, v, chunks = case.tensors()
    padded = replace(case, queries=4 + right, length=24 + left + right, left=(left,), right=(right,))
    big_q, big_k, big_v = (F.pad(x, (0, 0, 0, right), value=50.0) for x in (q, k, v))
    big_k, big_v = (F.pad(x, (0, 0, left, 0), value=50.0) for x in (big_k, big_v))
    out = padded.run(big_q, big_k, big_v, chunks, backend)
    torch.testing.assert_close(out[:, :, :4], case.run(q, k, v, chunks, backend), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("how", ["max", "none"])
def test_permuting_heads_permutes_results(backend: str, how: str) -> None:
    case = Case("heads", heads=6, kv_heads=3, queries=2, options={"group_reduce": how})
    q, k, v, chunks = case.tensors()
    out = case.run(q, k, v, chunks, backend)
    kv_order, order = torch.tensor([2, 0, 1]), torch.tensor([5, 4, 0, 1, 3, 2])  # groups move together, and turn inside
    moved = case.run(q[:, order], k[:, kv_order], v[:, kv_order], chunks[kv_order], backend)
    torch.testing.assert_close(moved, out[:, order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
def test_the_order_of_chunks_does_not_matter(backend: str) -> None:
    case = Case("chunks", n_tip=4, queries=2)
    q, k, v, chunks = case.tensors()
    turned = chunks.flip(1).flip(2)
    assert torch.equal(case.run(q, k, v, turned, backend), case.run(q, k, v, chunks, backend))


@pytest.mark.parametrize("backend", EXACT)
def test_all_chunks_rank_as_the_full_score(backend: str) -> None:
    """All chunks selected = oracle top-k: the result of attending to the best full scores, whatever the layout."""
    case = Case("all", n_tip=8, queries=3, options={"group_reduce": "none"})
    q, k, v, _ = case.tensors(dtype=torch.float64)
    for layout in (RotaryLayout.half_split(DIM), RotaryLayout.interleaved(DIM)):
        out = case.run(q, k, v, layout.chunks.expand(2, -1, -1), backend)
        for h in range(4):
            for i in range(3):
                slots = oracle.top((k[0, h // 2] @ q[0, h, i]).numpy(), range(24 - 3 + i + 1), 6)
                rows = oracle.attend(q[0, h, i].numpy(), k[0, h // 2].numpy(), v[0, h // 2].numpy(), slots, DIM**-0.5)
                np.testing.assert_allclose(out[0, h, i].numpy(), rows, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("how", ["max", "mean", "softmax", "none"])
def test_rows_without_a_valid_key_are_zero(backend: str, how: str) -> None:
    options = {"n_sink": 1, "n_recent": 1, "group_reduce": how}
    case = Case("empty", batch=2, queries=4, length=16, left=(16, 14), n_fac=0.5, options=options)
    out = case.run(*case.tensors(), backend)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1, :, :2], torch.zeros_like(out[1, :, :2]))
    assert (out[1, :, 2:] != 0).all()


@pytest.mark.parametrize("backend", EXACT)
def test_packed_keys_replace_the_keys_in_scoring_only(backend: str) -> None:
    case = Case("packed", queries=2, batch=2)
    q, k, v, chunks = case.tensors()
    packed = torch.stack([k[:, n][..., chunks[n].flatten()] for n in range(2)], 1)
    options: dict[str, Any] = {"n_fac": 6, "backend": backend}
    assert torch.equal(
        plain_attention(q, k, v, chunks, packed_keys=packed, **options), case.run(q, k, v, chunks, backend)
    )

    other = integers(2, 2, 24, DIM, seed=99)
    elsewhere = torch.stack([other[:, n][..., chunks[n].flatten()] for n in range(2)], 1)
    out = plain_attention(q, k, v, chunks, packed_keys=elsewhere, **options)
    ranked = case.oracle(q, other, v, chunks).selected
    for (b, h, i), slots in ranked.items():
        row = oracle.attend(*(x.double().numpy() for x in (q[b, h, i], k[b, h // 2], v[b, h // 2])), slots, DIM**-0.5)
        np.testing.assert_allclose(out[b, h, i].numpy(), row, atol=1e-5)


@pytest.mark.parametrize("backend", EXACT)
def test_inputs_are_not_changed_and_may_be_views(backend: str) -> None:
    case = Case("views", queries=2, batch=2, left=(0, 3))
    q, k, v, chunks = case.tensors()
    expected = case.run(q, k, v, chunks, backend)
    strided = [torch.empty(2, x.shape[2], x.shape[1], DIM).copy_(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
    copies = [x.clone() for x in strided]
    assert not strided[1].is_contiguous()
    assert torch.equal(case.run(*strided, chunks, backend), expected)
    assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("backend", EXACT)
def test_is_deterministic_and_leaves_the_random_state_alone(backend: str) -> None:
    case = Case("again", queries=3)
    state = torch.get_rng_state()
    first, second = (case.run(*case.tensors(), backend) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_is_one_of_the_backends() -> None:
    case = Case("auto", queries=3)
    torch.testing.assert_close(case.run(*case.tensors(), "auto"), case.run(*case.tensors(), "reference"))
