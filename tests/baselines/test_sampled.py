"""The random sample of the remainder: written out, unbiased, its own for every query, dense where it takes all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.baselines import AllDimensions, Sampled
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import Given
from fasa_flex.core.selection import select, valid_keys
from fasa_flex.core.softmax import Softmax

HEADS, GROUP, DIM, KEYS = 2, 2, 8, 200


def states(queries: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS * GROUP, queries, DIM, generator=generator)
    key, value = (torch.randn(1, HEADS, KEYS, DIM, generator=generator) for _ in range(2))
    return query, key, value


def attended(scorer: Sampled, budget: Budget, *given: Tensor, backend: str = "gather") -> Tensor:
    valid = valid_keys(given[0].shape[2], KEYS, None, given[0].device)
    call = Call(*given, scorer, valid, budget, "softmax_exact", Softmax(DIM**-0.5))
    return sparse_attention(call, backend)


def drawn(scorer: Sampled, budget: Budget, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of values that are one-hot: [Hq, Q, T]; and the plain selection's mask [Hkv, Q, T]."""
    ones = torch.eye(KEYS).expand(1, HEADS, -1, -1)
    valid = valid_keys(query.shape[2], KEYS, None, query.device)
    scores = AllDimensions()(query, key)
    ranking = torch.where(valid, scores * DIM**-0.5, -torch.inf).softmax(-1).sum(2, keepdim=True)
    return attended(scorer, budget, query, key, ones)[0], select(ranking, valid, budget).mask[0, :, 0]


def test_half_are_the_best_and_the_others_weigh_what_they_stand_for() -> None:
    query, key, _ = states()
    budget = Budget(40, 4, 8)
    weights, _ = drawn(Sampled(AllDimensions(), 0.5, seed=3), budget, query, key)
    _, best = drawn(Sampled(AllDimensions()), Budget(20, 4, 8), query, key)
    taken = weights.view(HEADS, GROUP, 3, KEYS) > 0
    assert torch.equal(taken[:, 0], taken[:, 1])
    assert taken[:, 0].sum(-1).eq(40).all()
    assert (taken[:, 0] & best).sum(-1).eq(20).all()
    logits = (query.view(HEADS, GROUP, 3, DIM) @ key[0, :, None].mT) * DIM**-0.5
    for q in range(3):
        others = KEYS - 2 + q - 20
        log_weights = torch.where(best[:, None, q], 0.0, math.log(others / 20))
        expected = (logits[:, :, q] + log_weights).masked_fill(~taken[:, :, q], -torch.inf).softmax(-1)
        torch.testing.assert_close(weights.view(HEADS, GROUP, 3, KEYS)[:, :, q], expected)


def test_masses_are_unbiased_and_every_key_of_the_remainder_is_drawn_alike() -> None:
    query, key, _ = states(1)
    valid = valid_keys(1, KEYS, None, query.device)
    chosen = torch.stack(
        [drawn(Sampled(AllDimensions(), 0.5, seed), Budget(40), query, key)[0][::GROUP, 0] > 0 for seed in range(400)]
    ).float()
    _, best = drawn(Sampled(AllDimensions()), Budget(20), query, key)
    often = chosen.mean(0)
    assert often[best[:, 0]].eq(1.0).all()
    rest = often[~best[:, 0] & valid[0, 0, 0, 0]]
    assert abs(float(rest.mean()) - 20 / 180) < 1e-6
    deviation = math.sqrt(20 / 180 * 160 / 180 / 400)
    assert float((rest - 20 / 180).abs().max()) < 5 * deviation
    assert 0.8 * deviation < float(rest.std()) < 1.2 * deviation
    between = torch.corrcoef(chosen[:, 0][:, ~best[0, 0]].T)
    assert float(between.fill_diagonal_(0).abs().mean()) < 0.06


def test_a_draw_goes_by_the_query_and_not_by_those_beside_it_or_padding() -> None:
    query, key, value = states(5)
    scorer, budget = Sampled(AllDimensions(), seed=7), Budget(30, 2, 4)
    whole = attended(scorer, budget, query, key, value)
    alone = attended(scorer, budget, query[:, :, -1:], key, value)
    torch.testing.assert_close(whole[:, :, -1:], alone)
    wide = [torch.cat([torch.full_like(x[:, :, :9], 30.0), x], dim=2) for x in (key, value)]
    mask = (torch.arange(KEYS + 9) >= 9)[None]
    valid = valid_keys(1, KEYS + 9, mask, query.device)
    call = Call(query[:, :, -1:], *wide, scorer, valid, budget, "softmax_exact", Softmax(DIM**-0.5))
    padded = sparse_attention(call, "gather")
    torch.testing.assert_close(padded, alone)
    first, second = (drawn(Sampled(AllDimensions(), seed=seed), budget, query, key)[0] > 0 for seed in (7, 8))
    assert not torch.equal(first, second)
    same = query[:, :, :1].expand(-1, -1, 5, -1)  # equal queries at other places draw other keys
    at = drawn(scorer, budget, same, key)[0] > 0
    assert not torch.equal(at[0, 0], at[0, 1])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("forced", [(0, 0), (20, 30)])
def test_forced_tokens_stay_and_the_budget_is_kept(share: float, forced: tuple[int, int]) -> None:
    query, key, value = states()
    weights, _ = drawn(Sampled(AllDimensions(), share), Budget(50, *forced), query, key)
    assert (weights > 0).sum(-1).eq(50).all()
    for q in range(3):
        last = KEYS - 3 + q
        assert (weights[:, q, : forced[0]] > 0).all()
        assert (weights[:, q, last - forced[1] + 1 : last + 1] > 0).all()
    dense = (query.view(1, HEADS, GROUP, 3, DIM) @ key[:, :, None].mT) * DIM**-0.5
    dense = dense.masked_fill(~valid_keys(3, KEYS, None, query.device), -torch.inf).softmax(-1) @ value[:, :, None]
    every = attended(Sampled(AllDimensions(), share), Budget(KEYS, *forced), query, key, value)
    torch.testing.assert_close(every, dense.flatten(1, 2))


def test_a_share_of_the_whole_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"):
        Sampled(AllDimensions(), 1.0)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_a_mean_value_by_all_valid_keys(backend: str) -> None:
    """SparQ's: of the first tokens, too, and of those that fill no block."""
    query, key, value = states()
    valid = valid_keys(3, KEYS, None, query.device)
    scores = AllDimensions()(query, key)
    softmax, completion = Softmax(DIM**-0.5), Completion(0.0, by_all=True)
    given = (query, key, value, Given(scores), valid, Budget(20), "softmax_exact", softmax)
    got = sparse_attention(Call(*given, completion=completion), backend)
    plain = sparse_attention(Call(*given), backend)
    logits = torch.where(valid, scores * DIM**-0.5, -torch.inf).softmax(-1)
    mask = select(logits.sum(2, keepdim=True), valid, Budget(20)).mask
    share = torch.where(mask, logits, 0.0).sum(-1, keepdim=True)
    mean = torch.stack([value[:, :, : KEYS - 2 + q].mean(2) for q in range(3)], dim=2)[:, :, None]
    expected = share * plain.view(1, HEADS, GROUP, 3, DIM) + (1 - share) * mean
    torch.testing.assert_close(got.view_as(expected), expected)
