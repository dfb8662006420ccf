"""DominantChunks (TIP): scores per query head against the oracle, packed keys, other scorers through the same door."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch

from fasa_flex import RotaryLayout
from fasa_flex.reads import ReadShare
from fasa_flex.scoring import DominantChunks, attention_weights, reduce_group

DIM = 8


def chunks(heads: int, n_tip: int) -> torch.Tensor:
    order = torch.rand(heads, DIM // 2, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :n_tip]
    return RotaryLayout.half_split(DIM).chunks[order]


@pytest.mark.parametrize("n_tip", [1, 2, 4])
@pytest.mark.parametrize("rows", [2, 6], ids=["per kv head", "per query head"])
def test_scores_equal_the_oracle(n_tip: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 6, 3, DIM, generator=generator), torch.randn(2, 2, 11, DIM, generator=generator)
    pairs = chunks(rows, n_tip)
    scores = DominantChunks.from_chunks(pairs)(q, k)
    assert scores.shape == (2, 2, 3, 3, 11)
    assert scores.dtype == torch.float32
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(3)).tolist():
        mine = pairs[h if rows == 6 else h // 3].tolist()
        expected = oracle.score(q[b, h, i].double().numpy(), k[b, h // 3].double().numpy(), mine)
        np.testing.assert_allclose(scores[b, h // 3, h % 3, i].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "n_tip", "share"),
    [(2, 1, 2 / 16), (2, 4, 8 / 16), (6, 1, 3 * 2 / 16), (6, 4, 0.5)],
    ids=["per kv head", "all of the head", "per query head", "no more than whole keys"],
)
def test_ranking_reads_the_dimensions_of_every_set_once(rows: int, n_tip: int, share: float) -> None:
    """Of 2 * DIM numbers of a key and a value; three query heads share one of two key/value heads."""
    assert DominantChunks.from_chunks(chunks(rows, n_tip)).reads(DIM, 6, 2) == ReadShare(ranking=share)


def test_packed_keys_hold_the_chunks_in_order_and_score_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 4, 2, DIM, generator=generator), torch.randn(1, 2, 11, DIM, generator=generator)
    pairs = chunks(2, 2)
    scorer = DominantChunks.from_chunks(pairs)
    packed = scorer.pack(k)
    assert packed.is_contiguous()
    for n in range(2):
        assert torch.equal(packed[:, n], k[:, n][..., pairs[n].flatten()])
    torch.testing.assert_close(scorer(q, k, packed), scorer(q, k), atol=1e-6, rtol=0)


def test_half_precision_is_accumulated_in_single() -> None:
    """256 + 0.5 + ... : a bfloat16 sum would lose every half."""
    q, k = torch.ones(1, 1, 1, DIM, dtype=torch.bfloat16), torch.full((1, 1, 2, DIM), 0.5, dtype=torch.bfloat16)
    k[..., 0] = 256.0
    k[0, 0, 1, 7] = 1.0
    scores = DominantChunks.from_chunks(RotaryLayout.half_split(DIM).chunks[None])(q, k)
    assert scores.flatten().tolist() == [259.5, 260.0]


def test_scorers_are_themselves_and_do_not_change() -> None:
    """Equal dimensions do not make two scorers equal: a cache is asked whether it packs for this very one."""
    pairs = chunks(2, 2)
    scorer, other = DominantChunks.from_chunks(pairs), DominantChunks.from_chunks(pairs)
    assert scorer == scorer
    assert scorer != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        scorer.dims = other.dims


def test_autocast_does_not_round_scores() -> None:
    q, k = torch.ones(1, 1, 1, DIM), torch.full((1, 1, 2, DIM), 0.5)
    k[..., 0] = 256.0
    k[0, 0, 1, 7] = 1.0
    scorer = DominantChunks.from_chunks(RotaryLayout.half_split(DIM).chunks[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(q, k)
    assert scores.dtype == torch.float32
    assert scores.flatten().tolist() == [259.5, 260.0]


# Two heads of a group, three keys, the last one not valid; written out.
TWO = torch.tensor([[0.0, 4.0, 9.0], [3.0, 1.0, 9.0]]).view(1, 1, 2, 1, 3)
VALID = torch.tensor([True, True, False]).view(1, 1, 1, 1, 3)


@pytest.mark.parametrize(("how", "expected"), [("max", [3.0, 4.0]), ("mean", [1.5, 2.5])])
def test_a_group_ranks_as_one_written_out(how: str, expected: list[float]) -> None:
    reduced = reduce_group(TWO, VALID, how, 0.5)
    assert reduced.shape == (1, 1, 1, 1, 3)
    assert reduced.flatten()[:2].tolist() == expected


def test_a_group_ranks_by_the_sum_of_its_weights_written_out() -> None:
    """Each head's softmax over its valid keys at scale 0.5, then the sum of both."""
    weights = [[1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))], [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]]
    expected = [weights[0][j] + weights[1][j] for j in range(2)]
    reduced = reduce_group(TWO, VALID, "softmax", 0.5)
    assert reduced.shape == (1, 1, 1, 1, 3)
    np.testing.assert_allclose(reduced.flatten()[:2].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("how", ["max", "mean", "softmax", "none"])
def test_a_group_of_one_ranks_by_its_scores(how: str) -> None:
    """Unrounded: a softmax would make ties of close scores."""
    assert reduce_group(TWO[:, :, :1], VALID, how, 0.5).equal(TWO[:, :, :1])
    assert reduce_group(TWO, VALID, "none", 0.5).equal(TWO)


@pytest.mark.parametrize("how", ["max", "mean", "softmax", "none"])
def test_a_compiled_group_ranks_alike(how: str) -> None:
    """Head by head under the compiler on CPU; rows have keys of their own, and one has none."""
    scores = torch.randn(3, 2, 4, 2, 37, generator=torch.Generator().manual_seed(3)) * 5
    share = torch.tensor([1.0, 0.6, 0.0]).view(3, 1, 1, 1, 1)
    valid = torch.rand(3, 1, 1, 2, 37, generator=torch.Generator().manual_seed(4)) < share
    compiled = torch.compile(reduce_group, fullgraph=True)(scores, valid, how, 0.5)
    expected = reduce_group(scores, valid, how, 0.5)
    assert compiled.shape == expected.shape
    some = valid.expand(expected.shape)
    torch.testing.assert_close(compiled[some], expected[some], atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


def test_attention_weights_are_the_softmax_and_an_operator() -> None:
    """What a graph for a GPU calls; on CPU nothing else here does."""
    logits = torch.randn(2, 3, 4, 1, 5, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 0, 0, 2:] = -math.inf
    assert attention_weights(logits).equal(logits.softmax(-1))
    torch.library.opcheck(torch.ops.fasa_flex.attention_weights.default, (logits,))
