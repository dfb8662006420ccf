"""The criteria: logit statistics against the logits written out, and what each choice must hold."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fasa_flex import RotaryLayout
from fasa_flex.core import criteria
from fasa_flex.core.criteria import causal, explained_share, least_squares_weights, logit_statistics, most_explaining

CHUNKS, KV_HEADS, GROUP, SCALING = 4, 2, 3, 0.3
LAYOUT = RotaryLayout.interleaved(2 * CHUNKS, rotary_dim=4)


def states(queries: int = 5, keys: int = 40, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys, the chunks of very different size and correlated, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, KV_HEADS * GROUP, queries, 2 * CHUNKS, generator=generator)
    key = torch.randn(batch, KV_HEADS, keys, 2 * CHUNKS, generator=generator)
    mixed = torch.randn(2 * CHUNKS, 2 * CHUNKS, generator=generator) * torch.logspace(-1, 1, 2 * CHUNKS)
    return query, key @ mixed + 20


def covariances(layers: int = 3, seed: int = 1) -> Tensor:
    factors = torch.randn(layers, KV_HEADS, CHUNKS, CHUNKS + 2, generator=torch.Generator().manual_seed(seed))
    return factors @ factors.mT


def test_statistics_are_those_of_the_logits_written_out() -> None:
    """Part by part, query by query, float64, with a mask of no particular order."""
    query, key = states()
    visible = torch.rand(2, 5, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    got = logit_statistics(query, key, visible, LAYOUT.chunks, SCALING)
    variance = torch.zeros(KV_HEADS * GROUP, CHUNKS, dtype=torch.float64)
    covariance = torch.zeros(KV_HEADS, CHUNKS, CHUNKS, dtype=torch.float64)
    whole = torch.zeros(KV_HEADS, dtype=torch.float64)
    mean = torch.zeros(KV_HEADS, 2 * CHUNKS, dtype=torch.float64)
    for row in range(2):
        for head in range(KV_HEADS * GROUP):
            for number in range(5):
                seen = key[row, head // GROUP, visible[row, number]].double()
                parts = [SCALING * seen[:, dims] @ query[row, head, number, dims].double() for dims in LAYOUT.chunks]
                variance[head] += torch.stack([part.var(correction=0) for part in parts]) / 10
                covariance[head // GROUP] += torch.cov(torch.stack(parts), correction=0) / (10 * GROUP)
                whole[head // GROUP] += torch.stack(parts).sum(0).var(correction=0) / (10 * GROUP)
                mean[head // GROUP] += seen.mean(0) / (10 * GROUP)
    torch.testing.assert_close(got.variance, variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.covariance, covariance, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.mean_key, mean, rtol=1e-6, atol=0)
    # what one follows from another
    torch.testing.assert_close(got.covariance.sum((1, 2)), whole, rtol=1e-6, atol=0)
    diagonal = got.covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, got.variance.view(KV_HEADS, GROUP, CHUNKS).mean(1), rtol=1e-9, atol=0)


def close(one: criteria.LogitStatistics, other: criteria.LogitStatistics) -> None:
    for name in ("variance", "covariance", "mean_key"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-8, atol=1e-8)


def test_pieces_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = states()
    visible = causal(5, 40, query.device)
    whole = logit_statistics(query, key, visible, LAYOUT.chunks, SCALING)
    monkeypatch.setattr(criteria, "_BYTES", 1)
    close(logit_statistics(query, key, visible, LAYOUT.chunks, SCALING), whole)
    rows = [
        logit_statistics(q[None], k[None], visible, LAYOUT.chunks, SCALING) for q, k in zip(query, key, strict=True)
    ]
    for name in ("variance", "covariance", "mean_key"):
        mean = torch.stack([getattr(row, name) for row in rows]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, name), rtol=1e-8, atol=1e-8)


def test_the_order_of_keys_does_not_count() -> None:
    query, key = states()
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    visible = causal(5, 40, query.device)
    one = logit_statistics(query, key, visible, LAYOUT.chunks, SCALING)
    close(one, logit_statistics(query, key[:, :, shuffle], visible[..., shuffle], LAYOUT.chunks, SCALING))


def test_a_shift_of_all_keys_changes_the_mean_key_alone() -> None:
    query, key = states()
    visible = causal(5, 40, query.device)
    one = logit_statistics(query, key.double(), visible, LAYOUT.chunks, SCALING)
    other = logit_statistics(query, key.double() + 1000, visible, LAYOUT.chunks, SCALING)
    torch.testing.assert_close(other.covariance, one.covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.mean_key, one.mean_key + 1000, rtol=1e-8, atol=0)


@pytest.mark.parametrize("n_tip", range(1, CHUNKS + 1))
def test_the_greedy_choice_is_the_best_next_chunk_every_time(n_tip: int) -> None:
    tables = covariances()
    got = most_explaining(tables, n_tip)
    assert got.shape == (3, KV_HEADS, n_tip)
    assert (got.diff(dim=-1) > 0).all()
    for table, chosen in zip(tables.flatten(0, 1), got.flatten(0, 1), strict=True):
        expected: list[int] = []
        for _ in range(n_tip):
            rest = [chunk for chunk in range(CHUNKS) if chunk not in expected]
            expected.append(
                max(rest, key=lambda chunk: float(explained_share(table, torch.tensor([*expected, chunk]))))
            )
        assert chosen.tolist() == sorted(expected)


def test_weights_are_those_of_least_squares_on_the_parts() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = torch.randn(500, CHUNKS, generator=generator, dtype=torch.float64) @ covariances()[0, 0].double()
    parts = parts - parts.mean(0)
    for chosen in map(list, combinations(range(CHUNKS), 2)):
        expected = torch.linalg.lstsq(parts[:, chosen], parts.sum(1, keepdim=True)).solution[:, 0]
        got = least_squares_weights(parts.mT @ parts, torch.tensor(chosen))
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        left = parts.sum(1) - parts[:, chosen] @ expected
        share = explained_share(parts.mT @ parts, torch.tensor(chosen))
        torch.testing.assert_close(1 - left.var() / parts.sum(1).var(), share, rtol=1e-6, atol=1e-9)


def test_all_chunks_explain_all_and_weigh_one() -> None:
    tables = covariances()
    whole = torch.arange(CHUNKS).expand(3, KV_HEADS, CHUNKS)
    assert torch.equal(most_explaining(tables, CHUNKS), whole)
    assert torch.equal(least_squares_weights(tables, whole), torch.ones(3, KV_HEADS, CHUNKS))
    torch.testing.assert_close(explained_share(tables, whole), torch.ones(3, KV_HEADS, dtype=torch.float64))


def test_chunks_that_say_nothing_new_are_taken_last() -> None:
    """Chunk 1 repeats chunk 0, chunk 2 is constant: chunk 3, smaller than both, tells more after 0; ties to the lower.

    Float32 rounding of a large table must not look like something new.
    """
    factors = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.01]], dtype=torch.float64) * 1e3 / 7
    table = (factors @ factors.mT).float()
    assert most_explaining(table, 1).tolist() == [0]
    assert most_explaining(table, 2).tolist() == [0, 3]
    torch.testing.assert_close(least_squares_weights(table, torch.tensor([0, 3])), torch.tensor([2.0, 1.0]))
    assert most_explaining(torch.zeros(2, 4, 4), 3).tolist() == [[0, 1, 2]] * 2
    assert least_squares_weights(torch.zeros(4, 4), torch.tensor([0, 2])).tolist() == [1, 1]
