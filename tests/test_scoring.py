"""DominantChunks (TIP): scores per query head against the oracle, packed keys, other scorers through the same door."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from sentences import raises_sentence
from torch import Tensor

from fasa_flex import RotaryLayout
from fasa_flex.baselines import H2O
from fasa_flex.core.adapted_scorers import as_scorer
from fasa_flex.core.budget import Budget
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.group_reduce import attention_weights, reduce_group, weigh
from fasa_flex.core.packed_keys import PackedDtype, PackedKeys
from fasa_flex.core.scoring import DominantChunks, Scorer, SequenceScorer
from fasa_flex.core.selection import Marks, valid_keys
from fasa_flex.core.softmax import Softmax

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


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_beside_a_mean_key_equal_the_oracle(dtype: PackedDtype | None, weighted: bool) -> None:
    """Weighted, rounded, and packed too, where the same rows are rounded."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 4, 1, DIM, generator=generator), torch.randn(2, 2, 21, DIM, generator=generator)
    mean, pairs = 3 * torch.randn(2, DIM, generator=generator), chunks(2, 3)
    weights = torch.rand(2, 3, generator=generator) if weighted else None
    by_dim = None if weights is None else weights.repeat_interleave(2, -1)
    scorer = DominantChunks(pairs.flatten(1), mean, by_dim, dtype)
    scores = scorer(q, k + mean[:, None])
    assert torch.allclose(scores, scorer(q, k + mean[:, None], PackedKeys.of(scorer.pack(k + mean[:, None]), dtype)))
    for b, h in np.ndindex(2, 4):
        mine = (x[h // 2].double().numpy() for x in (k[b] + mean[:, None], pairs, mean))
        keys, own, centre = mine
        weigh = None if weights is None else weights[h // 2].double().numpy()
        bits = {None: None, "int8": 8, "int4": 4}[dtype]
        expected = oracle.score(q[b, h, 0].double().numpy(), keys, own.astype(int), centre, bits, weigh)
        np.testing.assert_allclose(scores[b, h // 2, h % 2, 0].numpy(), expected, atol=2e-5)


def test_a_mean_key_shifts_all_scores_of_a_query_head_alike() -> None:
    """By its part outside of the chunks, so that no head's ranking changes, nor a group's by mean or weights."""
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(1, 4, 3, DIM, generator=generator), torch.randn(1, 2, 40, DIM, generator=generator)
    pairs, mean = chunks(2, 2), 3 * torch.randn(2, DIM, generator=generator)
    bare, centred = DominantChunks(pairs.flatten(1))(q, k), DominantChunks(pairs.flatten(1), mean)(q, k)
    shift = centred - bare
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift), atol=2e-5, rtol=0)
    assert shift[..., 0].std() > 1
    valid, softmax = valid_keys(3, 40, None, q.device), Softmax(0.5)
    sample = Marks.of(valid, Budget(4), samples=True).sample
    for how in ("mean", "softmax", "softmax_exact"):
        rankings = [reduce_group(scores, valid, how, softmax, sample) for scores in (bare, centred)]
        orders = [torch.where(valid, ranking, -torch.inf).argsort(-1)[..., -8:] for ranking in rankings]
        assert torch.equal(*orders), how
    outside = mean.clone()
    outside.scatter_(-1, pairs.flatten(1), 0.0)
    within = DominantChunks(pairs.flatten(1), mean - outside)(q, k)  # then "max" compares the same numbers, too
    torch.testing.assert_close(within, bare, atol=2e-5, rtol=0)


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


class Norms(Scorer):
    def score(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
        return key.norm(dim=-1)[:, :, None, None].expand(-1, -1, 1, query.shape[2], -1)


class Ducks:
    """A class of a user's that knows no base class."""

    estimates_logits = completes_by_all = True
    remembers = False

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def __call__(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
        return Norms()(query, key) + self.rank

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        return ReadShare(query_heads / head_dim)

    def shard(self, rank: int, ranks: int) -> Ducks:
        return Ducks(rank * ranks)


class Followed(Ducks):
    def follow(self, forward: Any) -> Any:
        return forward


def test_the_members_of_a_scorer_have_defaults() -> None:
    scorer, (query, key) = Norms(), torch.ones(2, 1, 2, 3, 4)
    assert as_scorer(scorer) is scorer
    assert (scorer.stateful, scorer.estimates_logits, scorer.completes_by_all) == (False, False, False)
    assert scorer.reads(4, 2, 2) is scorer.reads_packed(4, torch.float32) is None
    assert scorer.shard(1, 2) is scorer
    assert scorer(query, key).tolist() == scorer.score(query, key).tolist() == torch.full((1, 2, 1, 3, 3), 2.0).tolist()
    with pytest.raises(TypeError, match="score"):
        Scorer()  # type: ignore[abstract]  # the mistake
    with pytest.raises(TypeError, match="follow"):
        SequenceScorer()  # type: ignore[abstract]  # the mistake


def test_a_scorer_of_another_class_keeps_its_members() -> None:
    (query, key), scorer = torch.ones(2, 1, 2, 3, 4), as_scorer(Ducks())
    assert not isinstance(scorer, SequenceScorer)
    assert (scorer.name, scorer.stateful, scorer.estimates_logits, scorer.completes_by_all) == (
        "Ducks",
        False,
        True,
        True,
    )
    assert scorer.reads(4, 2, 2) == ReadShare(0.5)
    assert (scorer.shard(1, 2).score(query, key) - scorer.score(query, key)).unique().tolist() == [2.0]
    assert getattr(scorer, "attend", None) is None
    plain = as_scorer(Ducks().__call__)
    assert plain.name == "__call__"
    assert scorer.signature != plain.signature
    assert plain.reads(4, 2, 2) is None
    assert plain.shard(1, 2) is plain
    assert torch.equal(plain(query, key), Norms()(query, key))


def test_an_object_that_follows_is_a_sequence_scorer() -> None:
    scorer = as_scorer(Followed())
    assert isinstance(scorer, SequenceScorer)
    assert scorer.follow(3) == 3  # type: ignore[arg-type]
    assert scorer.stateful is False
    assert as_scorer(SimpleNamespace(follow=None)).stateful is True
    with raises_sentence(NotImplementedError, match="H2O scores a whole forward, not a query and keys alone"):
        H2O().score(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))


def test_subclasses_may_use_former_names() -> None:
    class Former(Scorer):
        remembers = True

        def __call__(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
            return Norms()(query, key)

    class Negative(Norms):
        def __call__(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
            return -super().__call__(query, key)

    class StillNegative(Negative):
        """Defines neither name."""

    query, key = torch.ones(2, 1, 2, 3, 4)
    assert (Former().stateful, Negative().stateful) == (True, False)
    assert StillNegative()(query, key).unique().tolist() == [-2.0]
    assert Former()(query, key).unique().tolist() == Former().score(query, key).unique().tolist() == [2.0]
    assert Negative()(query, key).unique().tolist() == [-2.0]


def test_a_call_is_the_score_of_the_nearest_class() -> None:
    class Zeros:
        def score(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
            return torch.zeros(1)

    class Mixed(Zeros, Norms):
        pass

    class Twice(Norms):
        def score(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
            return 2 * super().score(query, key)

    query, key = torch.ones(2, 1, 2, 3, 4)
    assert Mixed()(query, key).tolist() == [0.0]
    assert Twice()(query, key).unique().tolist() == [4.0]


# Two heads of a group, three keys, the last one not valid; written out.
TWO = torch.tensor([[0.0, 4.0, 9.0], [3.0, 1.0, 9.0]]).view(1, 1, 2, 1, 3)
VALID = torch.tensor([True, True, False]).view(1, 1, 1, 1, 3)
HALF = Softmax(0.5)


@pytest.mark.parametrize(("how", "expected"), [("max", [3.0, 4.0]), ("mean", [1.5, 2.5])])
def test_a_group_ranks_as_one_written_out(how: str, expected: list[float]) -> None:
    reduced = reduce_group(TWO, VALID, how, HALF)
    assert reduced.shape == (1, 1, 1, 1, 3)
    assert reduced.flatten()[:2].tolist() == expected


def test_a_group_ranks_by_the_sum_of_its_weights_written_out() -> None:
    """Each head's softmax over its valid keys at scale 0.5, then the sum of both; by a sample of all, its logarithm."""
    weights = [[1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))], [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]]
    expected = [weights[0][j] + weights[1][j] for j in range(2)]
    both = torch.tensor([0, 1, -1]).view(1, 1, 1, 1, 3)
    for how, sample, undo in (("softmax_exact", None, torch.Tensor.clone), ("softmax", both, torch.exp)):
        reduced = undo(reduce_group(TWO, VALID, how, HALF, sample))
        assert reduced.shape == (1, 1, 1, 1, 3)
        np.testing.assert_allclose(reduced.flatten()[:2].numpy(), expected, atol=1e-6)


def test_a_sample_is_counted_by_valid_keys_and_not_by_slots() -> None:
    """The first 4, the last 64 and every 32nd of those that a query may attend to, wherever they lie."""
    mask = torch.rand(3, 260, generator=torch.Generator().manual_seed(6)) < torch.tensor([[1.0], [0.7], [0.02]])
    valid = valid_keys(2, 260, mask, mask.device)
    sample = Marks.of(valid, Budget(4), samples=True).sample
    for b, i in np.ndindex(3, 2):
        keys = oracle.valid_keys(258 + i, mask[b].tolist())
        assert sorted(slot for slot in sample[b, 0, 0, i].tolist() if slot >= 0) == oracle.sample(keys)
    assert (sample[0, 0, 0, 1] >= 0).sum() == 4 + 64 + 6  # 32, 64, ... 192
    assert Marks.of(valid, Budget(4), samples=False) == Marks(None, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("how", ["softmax", "softmax_exact"])
def test_a_groups_ranking_is_the_oracles_over_more_keys_than_are_sampled(how: str, softcap: float | None) -> None:
    scores = 3 * torch.randn(2, 1, 3, 1, 200, generator=torch.Generator().manual_seed(5))
    valid = valid_keys(1, 200, torch.arange(200) >= torch.tensor([[0], [37]]), scores.device)
    softmax = Softmax(0.7, softcap)
    ranking = reduce_group(scores, valid, how, softmax, Marks.of(valid, Budget(4), samples=True).sample)
    for b in range(2):
        keys = valid[b].flatten().nonzero().flatten().tolist()
        expected = oracle.reduce_group(scores[b, 0, :, 0].double().numpy(), keys, how, 0.7, softcap)[keys]
        got = ranking[b, 0, 0, 0, keys]
        np.testing.assert_allclose((got if how == "softmax" else got.log()).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_weights_that_would_overflow_rank(size: float) -> None:
    """Keys outside of the sample may be ahead of it by any number; they would all be infinite, and the others 0."""
    scores = size * torch.rand(1, 1, 2, 1, 200, generator=torch.Generator().manual_seed(7))
    scores[..., 5:9] += size * torch.arange(1, 5)
    valid = valid_keys(1, 200, None, scores.device)
    ranking = reduce_group(scores, valid, "softmax", Softmax(1.0), Marks.of(valid, Budget(4), samples=True).sample)
    assert ranking.isfinite().all()
    assert ranking.flatten()[:100].argsort(descending=True)[:4].tolist() == [8, 7, 6, 5]
    assert len(set(ranking.flatten().tolist())) >= 199  # the best of the sample of either head weighs 1


@pytest.mark.parametrize("how", ["max", "mean", "softmax", "softmax_exact", "none"])
def test_a_group_of_one_ranks_by_its_scores(how: str) -> None:
    """Unrounded: a softmax would make ties of close scores."""
    assert reduce_group(TWO[:, :, :1], VALID, how, HALF).equal(TWO[:, :, :1])
    assert reduce_group(TWO, VALID, "none", HALF).equal(TWO)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["max", "mean", "softmax", "softmax_exact", "none"])
def test_a_compiled_group_ranks_alike(how: str) -> None:
    """Head by head under the compiler on CPU; rows have keys of their own, and one has none."""
    scores = torch.randn(3, 2, 4, 2, 37, generator=torch.Generator().manual_seed(3)) * 5
    share = torch.tensor([1.0, 0.6, 0.0]).view(3, 1, 1, 1, 1)
    valid = torch.rand(3, 1, 1, 2, 37, generator=torch.Generator().manual_seed(4)) < share
    sample = Marks.of(valid, Budget(4), samples=True).sample
    compiled = torch.compile(reduce_group, fullgraph=True)(scores, valid, how, HALF, sample)
    expected = reduce_group(scores, valid, how, HALF, sample)
    assert compiled.shape == expected.shape
    some = valid.expand(expected.shape)
    torch.testing.assert_close(compiled[some], expected[some], atol=1e-6, rtol=1e-5)


def test_attention_weights_are_the_softmax_and_an_operator() -> None:
    """What a graph for a GPU calls; on CPU nothing else here does."""
    logits = torch.randn(2, 3, 4, 1, 5, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 0, 0, 2:] = -math.inf
    assert attention_weights(logits).equal(logits.softmax(-1))
    torch.library.opcheck(torch.ops.fasa_flex.attention_weights.default, (logits,))


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]  # a property of the base


@pytest.mark.parametrize("length", [1, 300, 900])
def test_in_a_gpus_graph_masses_are_summed_by_tile(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles without a valid key, a row without one and the tile behind the last key have no mass."""
    generator = torch.Generator().manual_seed(0)
    logits = 9.0 * torch.randn(3, 2, 4, 1, length, generator=generator)
    valid = (torch.rand(3, 1, 1, 1, length, generator=generator) < 0.7) & (torch.arange(length) > 100)
    valid[1] = False
    valid[2, ..., -1] = True
    sample = Marks.of(valid, Budget(4), samples=True).sample
    assert sample is not None
    expected = weigh(logits, valid, sample)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tiled = weigh(logits.as_subclass(OnGPU), valid, sample)
    for name in ("total", "unit", "ranking"):
        found, wanted = getattr(tiled, name).as_subclass(torch.Tensor), getattr(expected, name)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert tiled.total[1].eq(0).all()
