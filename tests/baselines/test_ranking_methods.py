"""Quest, SparQ, heavy channels and adjacent pairs: worked examples and their rules in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from baselines.plain import forward_of, selected, states
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import RotaryLayout, calibrate
from fasa_flex.baselines import Quest, SparQ, adjacent_pairs, channel_weights, scorer_factory
from fasa_flex.baselines.calibrated import heavy_channels
from fasa_flex.core.budget import Budget
from fasa_flex.core.group_reduce import reduce_group
from fasa_flex.core.selection import select, valid_keys
from fasa_flex.core.softmax import Softmax


def test_quest_written_out() -> None:
    """Pages of 2 keys, query (1, -2): a page's bound is its largest first dimension less twice its smallest second.

    Page 0: keys (1, 0), (0, -1): 1 + 2 = 3, more than either key's own score. Page 1: (2, 2), (-9, 1): 2 - 2 = 0. Page
    2 holds the query's own key (0, -3) alone: 6; the key behind it, (99, -99), is another query's.
    """
    key = torch.tensor([[1.0, 0], [0, -1], [2, 2], [-9, 1], [0, -3], [99, -99]]).view(1, 1, 6, 2)
    query = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0], [1, -2], [0, 0]]).view(1, 1, 6, 2)
    forward = forward_of(query, key, Budget(3), dense=4)
    scores = Quest(page=2).follow(forward)
    assert scores[0, 0, 0, 0, :5].tolist() == [3, 3, 0, 0, 6]
    assert selected(Quest(page=2), forward)[0, 0, 0, 0].tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_equals_its_bounds_in_plain_loops(page: int) -> None:
    query, key = states(2, 37)
    scores = Quest(page).follow(forward_of(query, key, Budget(5), dense=11))
    assert scores.shape == (2, 2, 2, 26, 37)
    for b, h, g, i in ((0, 0, 0, 0), (1, 1, 0, 5), (0, 1, 1, 20), (1, 0, 1, 25)):
        q, slot = query[b, 2 * h + g, 11 + i], 11 + i
        for j in range(slot + 1):
            members = [m for m in range(j - j % page, j - j % page + page) if m <= slot]
            bound = sum(max(float(q[d] * key[b, h, m, d]) for m in members) for d in range(8))
            assert float(scores[b, h, g, i, j]) == pytest.approx(bound, abs=1e-5)


def test_quest_counts_pages_from_the_first_real_token_and_ignores_free_slots() -> None:
    query, key = states(1, 40)
    alone = selected(Quest(), forward_of(query, key, Budget(20), dense=25))
    for pad, behind in ((5, 0), (0, 9), (16, 3)):
        wide = [torch.nn.functional.pad(x, (0, 0, pad, behind), value=50.0) for x in (query, key)]
        mask = torch.zeros(1, 40 + pad + behind, dtype=torch.bool)
        mask[:, pad : pad + 40] = True
        padded = selected(Quest(), forward_of(*wide, Budget(20), pad + 25, mask))
        assert torch.equal(padded[:, :, :, :15, pad : pad + 40], alone)
        buffer = torch.cat([key, torch.full_like(key, 50.0)], dim=2)
        step = selected(Quest(), forward_of(query[:, :, -1:], buffer, Budget(20), first_slot=39))
        assert torch.equal(step[..., :40], alone[:, :, :, -1:])


def test_sparq_written_out() -> None:
    """Two heads share the 2 dimensions of largest |q| added up: |1| + |2|, |0| + |1|, |-3| + |0|, |0| + |0|.

    So dimensions 0 and 2. Head 0's query (1, 0, -3, 0) has all its mass there, head 1's (2, 1, 0, 0) two thirds, so its
    scores are divided by the root of 2/3 (the temperature of the paper, less the usual root of D).
    """
    query = torch.tensor([[1.0, 0, -3, 0], [2, 1, 0, 0]]).view(1, 2, 1, 4)
    key = torch.tensor([[1.0, 100, 0, 100], [0, 100, -1, 100], [1, 100, 1, 100]]).view(1, 1, 3, 4)
    scores = SparQ(r=2)(query, key)
    assert scores[0, 0, 0, 0].tolist() == pytest.approx([1, 3, -2])
    assert scores[0, 0, 1, 0].tolist() == pytest.approx([2 / math.sqrt(2 / 3), 0, 2 / math.sqrt(2 / 3)])


def test_sparq_ranks_as_the_code_in_its_paper() -> None:
    """Appendix B: ``topk(softmax(Q_hat @ K_hat.T / scale + M).sum(group))`` for one query a row."""
    query, key = states(2, 50)
    query = query[:, :, -1:]
    valid = valid_keys(1, 50, None, key.device)
    ranked = reduce_group(SparQ(3)(query, key), valid, "softmax_exact", Softmax(8**-0.5))
    Q, K = query.view(2, 2, 2, 1, 8), key[:, :, None]
    dims = Q.abs().sum(2, keepdim=True).topk(3, -1).indices
    q_hat, k_hat = Q.gather(-1, dims.expand(-1, -1, 2, -1, -1)), K.gather(-1, dims.expand(-1, -1, -1, 50, -1))
    scale = (8 * q_hat.abs().sum(-1, keepdim=True) / Q.abs().sum(-1, keepdim=True)).sqrt()
    total = (q_hat @ k_hat.mT / scale).softmax(-1).sum(2, keepdim=True)
    torch.testing.assert_close(ranked, total)
    assert torch.equal(select(ranked, valid, Budget(9)).mask, select(total, valid, Budget(9)).mask)


def test_sparq_of_all_dimensions_is_the_full_product_and_of_a_zero_query_no_nan() -> None:
    query, key = states(1, 12)
    full = (query.view(1, 2, 2, 12, 8) @ key[:, :, None].mT).float()
    torch.testing.assert_close(SparQ(8)(query, key), full)
    assert SparQ()(torch.zeros_like(query), key).eq(0).all()
    assert SparQ().reads(8, 4, 2) == SparQ(2).reads(8, 4, 2)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SparQ(0), "r must be an integer of at least 1, got 0"),
        (lambda: SparQ(9)(*states(1, 3)), "r must not exceed the 8 dimensions of a head, got 9"),
        (lambda: Quest(0), "page must be an integer of at least 1, got 0"),
        (lambda: heavy_channels(torch.rand(3, 2, 8), 9), r"1 to D channels.*got 9 of \(3, 2, 8\)"),
        (lambda: heavy_channels(torch.rand(2, 8), 4), r"got 4 of \(2, 8\)"),
    ],
)
def test_parameters_that_fit_nothing_are_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_channel_weights_equal_plain_loops_over_captured_queries_and_keys(
    llama: PreTrainedModel, ids: Callable[..., Tensor], capture: Callable[..., list[tuple[Tensor, Tensor]]]
) -> None:
    samples = [ids(9, seed=1), ids(4, seed=2)]
    got = channel_weights(llama, samples)
    assert got.shape == (3, 2, 16)
    captured = [capture(llama, sample[None]) for sample in samples]
    for layer, head, channel in ((0, 0, 3), (1, 1, 15), (2, 0, 0)):
        added = [
            abs(float(q[0, 2 * head + g, t, channel] * k[0, head, t, channel])) / 2
            for q, k in (layers[layer] for layers in captured)
            for g in range(2)
            for t in range(q.shape[2])
        ]
        assert float(got[layer, head, channel]) == pytest.approx(sum(added) / 13, rel=1e-4)


def test_heavy_channels_score_alone() -> None:
    """Of weights 5, 1, 9, 5 the two heaviest are 2 and, the lower of two equals, 0."""
    weights = torch.tensor([5.0, 1, 9, 5]).view(1, 1, 4)
    assert heavy_channels(weights, 2).tolist() == [[[0, 2]]]
    scorer = scorer_factory("double_sparsity", channels=weights, n_tip=1)(0)
    query, key = torch.tensor([[1.0, 7, 2, 7]]).view(1, 1, 1, 4), torch.tensor([[3.0, 7, 5, 7]]).view(1, 1, 1, 4)
    assert scorer(query, key).flatten().tolist() == [13.0]


def test_adjacent_pairs_are_calibrated_as_pairs(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    layout = adjacent_pairs(RotaryLayout.detect(llama))
    assert layout.chunks.tolist() == [[2 * i, 2 * i + 1] for i in range(8)]
    samples = [ids(30)]
    true = calibrate(llama, samples, top_k=8, max_new_tokens=4, progress=False)
    paired = calibrate(llama, samples, top_k=8, max_new_tokens=4, progress=False, layout=layout)
    assert paired.layout == layout
    assert not torch.equal(paired.agreement, true.agreement)
    scorer = scorer_factory("adjacent_pairs", paired, n_tip=2)(1)
    assert scorer.dims.tolist() == paired.dominant_dims(2, criterion="agreement")[1].flatten(1).tolist()
    assert scorer.dims.tolist() != paired.dominant_dims(2)[1].flatten(1).tolist()  # by variance
    with pytest.raises(ValueError, match="was not calibrated for method 'adjacent_pairs'"):
        scorer_factory("adjacent_pairs", true)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("random_chunks", "method 'random_chunks' takes its chunks from a profile, got None"),
        ("adjacent_pairs", "method 'adjacent_pairs' takes its chunks from a profile, got None"),
        ("double_sparsity", "method 'double_sparsity' is calibrated; pass channels="),
        ("pyramid", "method must be one of 'streaming_llm', .*got 'pyramid'"),
    ],
)
def test_what_a_method_needs_is_asked_for(method: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        scorer_factory(method)


@pytest.mark.parametrize("method", ["streaming_llm", "oracle", "snapkv", "h2o", "rkv", "quest"])
def test_chunks_for_a_method_that_scores_by_none_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' scores by no chunks, so it takes no n_tip, got 4"):
        scorer_factory(method, n_tip=4)


def test_the_dimensions_of_sparq_are_named_as_they_were_given() -> None:
    """As chunks or as dimensions, 8 or 16 of a head here."""
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 5, 16)
    assert torch.equal(SparQ(r=6)(query, key), scorer_factory("sparq", n_tip=3)(0)(query, key))
    for scorer, reason in ((SparQ(r=17), r"r must not exceed the 16"), (SparQ(n_tip=9), r"n_tip must lie in 1\.\.8")):
        with pytest.raises(ValueError, match=reason):
            scorer(query, key)
    with pytest.raises(ValueError, match="r = 6 and n_tip = 3 say the same thing"):
        SparQ(6, 3)
