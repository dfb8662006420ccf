"""Attention by blocks against plain loops in float64, and what the grid, the selection and the estimators promise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import prefill_in_loops
import pytest
import torch
from sentences import raises_sentence
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.prefill import attention
from fasa_flex.prefill.attention import attend_to_blocks, block_sparse_attention
from fasa_flex.prefill.estimators import BlockEstimator, Blocks, antidiagonal, oracle, pooled, strided
from fasa_flex.prefill.grid import BLOCK, Grid, check_causal
from fasa_flex.prefill.selection import BlockBudget, BlockLists, all_blocks, select_blocks

ESTIMATORS = {"pooled": pooled, "strided": strided, "antidiagonal": antidiagonal, "oracle": oracle}


@dataclass(frozen=True)
class Case:
    """Rows of ``lengths`` tokens, padded on the left to the longest; the last ``queries`` slots are queries."""

    lengths: tuple[int, ...] = (600,)
    queries: int = 600
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    softcap: float | None = None
    sinks: bool = False
    spare: int = 0

    def make(self, seed: int = 0) -> tuple[Blocks, Tensor, Tensor]:
        """The blocks, the values, and the number of valid tokens up to each slot [B, T]."""
        generator = torch.Generator().manual_seed(seed)
        batch, longest = len(self.lengths), max(self.lengths)

        def drawn(heads: int, length: int, dim: int) -> Tensor:
            return torch.randn(batch, heads, length, dim, generator=generator)

        key, value = drawn(self.kv_heads, longest + self.spare, self.dim), drawn(self.kv_heads, longest, self.value_dim)
        value = F.pad(value, (0, 0, 0, self.spare))
        query = 2 * drawn(self.heads, self.queries, self.dim)
        slot = torch.arange(longest + self.spare)
        real = (slot >= longest - torch.tensor(self.lengths)[:, None]) & (slot < longest)
        number = real.cumsum(1)
        dims = torch.stack([torch.randperm(self.dim, generator=generator)[:8] for _ in range(self.kv_heads)])
        of_query = torch.where(real, number, 0)[:, longest - self.queries : longest]
        grid = Grid.of(of_query, number)
        assert grid is not None
        sinks = torch.randn(self.heads, generator=generator) if self.sinks else None
        softmax = Softmax(self.dim**-0.5, self.softcap, sinks)
        return Blocks(query, key, DominantChunks(dims), grid, softmax), value, of_query


CASES = {
    "one row": Case(),
    "whole blocks": Case((512,), 512),
    "padded rows": Case((600, 333), 600),
    "a second turn": Case((700, 300), 130),
    "a few tokens": Case((700,), 5),
    "one token": Case((641,), 1),
    "a static cache": Case((450,), 450, spare=200),
    "a group of one": Case((400,), 400, heads=2),
    "other values": Case((400,), 400, value_dim=24),
    "a cap": Case((450, 130), 450, softcap=2.0),
    "sinks": Case((450,), 450, sinks=True),
    "a cap and sinks": Case((450, 449), 200, softcap=3.0, sinks=True),
}


def by_loops(case: Case, mass: Tensor, share: float, held: float | None, completes: bool = False) -> Tensor:
    """What `block_sparse_attention` should give, from estimates [B, H, M, N]."""
    blocks, value, of_query = case.make()
    query, key, softmax = blocks.query, blocks.key, blocks.softmax
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(max(case.lengths))
    slots_of = slot >= max(case.lengths) - torch.tensor(case.lengths)[:, None]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for row in range(len(query)):
        slots = slots_of[row].nonzero().flatten().tolist()
        first = int(of_query[row][of_query[row] > 0][0] - 1) // BLOCK
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // mass.shape[1])
            for place, count in enumerate(of_query[row].tolist()):
                if not count:
                    continue
                token = count - 1
                estimates = mass[row, shared, token // BLOCK - first].tolist()
                picked = prefill_in_loops.chosen(estimates, token // BLOCK, share, held)
                sink = None if softmax.sinks is None else float(softmax.sinks[head])
                out[row, head, place] = prefill_in_loops.attention(
                    query[row, head, place],
                    key[row, head // group],
                    value[row, head // group],
                    picked,
                    token,
                    slots,
                    softmax.scaling,
                    softmax.softcap,
                    sink,
                    completes,
                )
    return out


@pytest.mark.parametrize(("held", "completes"), [(None, False), (0.8, False), (0.8, True)])
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_plain_loops(name: str, held: float | None, completes: bool) -> None:
    blocks, value, _ = CASES[name].make()
    mass = pooled(blocks, by_head=held is None)
    out, lists = block_sparse_attention(
        blocks, value, BlockBudget(0.6, held), lambda given: pooled(given, by_head=held is None), completes=completes
    )
    expected = by_loops(CASES[name], mass.flatten(1, 2), 0.6, held, completes)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
    chosen, causal = lists.pairs(blocks.grid).tolist()
    assert 0 < chosen <= causal


@pytest.mark.parametrize("name", ["one row", "padded rows", "a second turn"])
def test_a_share_of_one_is_dense_attention(name: str) -> None:
    blocks, value, of_query = CASES[name].make()
    out, lists = block_sparse_attention(blocks, value, BlockBudget(1.0), strided)
    whole = attend_to_blocks(blocks, all_blocks(blocks.grid, len(value), value.shape[1]), value)
    longest = value.shape[2]
    start = longest - of_query.max(1).values[:, None, None]
    slot, own = torch.arange(longest), torch.arange(longest - blocks.query.shape[2], longest)[:, None]
    dense = F.scaled_dot_product_attention(
        blocks.query.double(),
        blocks.key.double(),
        value.double(),
        attn_mask=((slot <= own) & (slot >= start))[:, None],
        scale=blocks.softmax.scaling,
        enable_gqa=True,
    )
    dense = torch.where(of_query[:, None, :, None] > 0, dense, 0.0)
    for got in (out, whole):
        torch.testing.assert_close(got.double(), dense, atol=2e-5, rtol=1e-4)
    chosen, causal = lists.pairs(blocks.grid).tolist()
    assert chosen == causal
    assert BlockBudget(1.0).covers(50)
    assert not BlockBudget(0.99).covers(200)
    assert BlockBudget(0.01).covers(3)
    assert not BlockBudget(1.0, 0.9).covers(50)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "completes"), [("padded rows", False), ("a cap", False), ("a cap", True)])
def test_flex_computes_the_same(name: str, completes: bool) -> None:
    blocks, value, _ = CASES[name].make()
    with torch.no_grad():
        budget = BlockBudget(0.5)
        by_flex, lists = block_sparse_attention(blocks, value, budget, pooled, "flex", completes)
        by_gather = attend_to_blocks(blocks, lists, value, "gather", completes)
        torch.testing.assert_close(by_flex, by_gather, atol=2e-5, rtol=1e-4)


def test_a_gpus_kernel_gets_lists_of_equal_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's kernel of torch 2.11 finds a query block's full blocks by the strides of the partial list."""
    blocks, value, _ = Case((1300,), 1300).make()
    lists = select_blocks(pooled(blocks).flatten(1, 2), blocks.grid, BlockBudget(0.5))
    lists = replace(lists, listed=lists.listed[..., :3])  # narrower than the grid, wider than the diagonal
    given: list[Tensor] = []

    def kernel(*arguments: Tensor) -> tuple[Tensor, None]:
        given.extend(arguments[3:7])
        return arguments[0], None

    monkeypatch.setattr(attention, "_compiled", lambda *signature: kernel)
    with FakeTensorMode():

        def on_gpu(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        grid = replace(blocks.grid, first=on_gpu(blocks.grid.first))
        moved = BlockLists(on_gpu(lists.diagonal), on_gpu(lists.count), on_gpu(lists.listed))
        states = (on_gpu(each) for each in (blocks.query, blocks.key, value))
        attention._by_flex(*states, moved, grid, blocks.softmax, None)
    _, partial, _, full = given
    assert partial.is_cuda
    assert partial.shape == full.shape
    assert partial.stride() == full.stride()
    assert full.shape[3] == 3


def test_flex_is_refused_where_it_cannot_serve() -> None:
    blocks, value, _ = CASES["sinks"].make()
    with raises_sentence(ValueError, "no learned sinks on CPU"):
        block_sparse_attention(blocks, value, BlockBudget(0.5), pooled, "flex")
    blocks, value, _ = CASES["one row"].make()
    with raises_sentence(ValueError, "no gradients"):
        block_sparse_attention(blocks, value.requires_grad_(), BlockBudget(0.5), pooled, "flex")


def test_gradients_reach_the_values() -> None:
    blocks, value, _ = CASES["one row"].make()
    out, _ = block_sparse_attention(blocks, value.requires_grad_(), BlockBudget(0.5), pooled)
    out.sum().backward()
    assert value.grad is not None
    assert float(value.grad.abs().sum()) > 0


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("changed", [130, 384, 500])
def test_blocks_never_look_ahead(estimator: BlockEstimator, changed: int) -> None:
    """Keys behind a block of queries change neither its selection nor its output."""
    blocks, value, _ = CASES["one row"].make()
    before, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    blocks.key[:, :, changed:] = 30.0
    value[:, :, changed:] = 30.0
    after, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    whole = changed // BLOCK * BLOCK
    assert torch.equal(before[:, :, :whole], after[:, :, :whole])
    assert not torch.allclose(before[:, :, changed:], after[:, :, changed:])


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_padding_is_never_attended_to(estimator: BlockEstimator) -> None:
    blocks, value, _ = CASES["padded rows"].make()
    before, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    blocks.key[1, :, : 600 - 333] = float("nan")
    value[1, :, : 600 - 333] = float("nan")
    after, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    assert torch.equal(before, after)
    assert not before[1, :, : 600 - 333].any()


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_rows_do_not_touch_each_other(estimator: BlockEstimator) -> None:
    """A padded row of a batch gets what it gets alone and unpadded."""
    blocks, value, _ = CASES["padded rows"].make()
    both, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    for row, pad in enumerate((0, 600 - 333)):
        number = torch.arange(1, 601 - pad)[None]
        grid = Grid.of(number, number)
        assert grid is not None
        assert grid.in_order
        query, key = blocks.query[row, None, :, pad:], blocks.key[row, None, :, pad:]
        alone = Blocks(query, key, blocks.scorer, grid, blocks.softmax)
        got, _ = block_sparse_attention(alone, value[row, None, :, pad:], BlockBudget(0.6), estimator)
        torch.testing.assert_close(got[0], both[row, :, pad:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("size", [128, 256, 384])
def test_chunks_of_whole_blocks_give_what_one_piece_gives(estimator: BlockEstimator, size: int) -> None:
    blocks, value, _ = CASES["one row"].make()
    whole, _ = block_sparse_attention(blocks, value, BlockBudget(0.6), estimator)
    for start in range(0, 600, size):
        end = min(600, start + size)
        number = torch.arange(1, end + 1)[None]
        grid = Grid.of(number[:, start:], number)
        assert grid is not None
        part = Blocks(blocks.query[:, :, start:end], blocks.key[:, :, :end], blocks.scorer, grid, blocks.softmax)
        got, _ = block_sparse_attention(part, value[:, :, :end], BlockBudget(0.6), estimator)
        torch.testing.assert_close(got, whole[:, :, start:end], atol=2e-6, rtol=1e-5)


def test_the_oracle_is_the_mean_attention_of_a_block() -> None:
    blocks, _, _ = CASES["whole blocks"].make()
    logits = blocks.query.double() @ blocks.key.double().repeat_interleave(2, 1).mT * blocks.softmax.scaling
    weights = logits.masked_fill(~torch.ones(512, 512, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    expected = weights.view(1, 4, 4, BLOCK, 4, BLOCK).sum(-1).mean(3)
    torch.testing.assert_close(oracle(blocks, by_head=True).flatten(1, 2).double(), expected, atol=1e-5, rtol=1e-4)
    together = oracle(blocks)[:, :, 0].double()
    torch.testing.assert_close(together, expected.view(1, 2, 2, 4, 4).mean(2), atol=1e-5, rtol=1e-4)


def test_estimates_in_pieces_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _, _ = CASES["a second turn"].make()
    blocks_alone, _, _ = CASES["one row"].make()
    wholes = [pooled(given) for given in (blocks, blocks_alone)]
    monkeypatch.setattr("fasa_flex.prefill.estimators.rows_of_piece", lambda row_bytes, on_cuda: 1)
    for given, whole in zip((blocks, blocks_alone), wholes, strict=True):
        own = given.grid.diagonal[:, None, None, :, None]
        seen = torch.arange(given.grid.n_keys) <= own  # behind the diagonal of padding blocks estimates are not read
        torch.testing.assert_close(torch.where(seen, pooled(given), 0.0), torch.where(seen, whole, 0.0))


@pytest.mark.parametrize("estimator", [pooled, strided, antidiagonal])
def test_an_estimate_finds_the_block_that_all_attend_to(estimator: BlockEstimator) -> None:
    """Keys of block 2 point where every query does, in the dominant dimensions; the others are noise."""
    blocks, _, _ = CASES["whole blocks"].make()
    direction = torch.zeros(16)
    direction[blocks.scorer.dims[0, :2]] = 3.0
    blocks.query[:, :2] += direction
    blocks.key[:, 0, 256:384] += direction
    assert int(estimator(blocks)[0, 0, 0, 3].argmax()) == 2


def test_a_selection_written_out() -> None:
    """Seven blocks of keys, the diagonal at 6: first, own and previous ones always, then by mass."""
    number = torch.arange(1, 7 * BLOCK + 1)[None]
    grid = Grid.of(number[:, 6 * BLOCK :], number)
    assert grid is not None
    mass = torch.tensor([0.05, 0.3, 0.0, 0.1, 0.3, 0.05, 0.2])[None, None, None]

    def taken(budget: BlockBudget) -> set[int]:
        lists = select_blocks(mass, grid, budget)
        listed: list[int] = lists.listed[0, 0, 0, : int(lists.count)].tolist()
        assert len(set(listed)) == len(listed)
        return {*listed, *lists.diagonal.flatten().tolist()}

    assert taken(BlockBudget(0.1)) == {0, 5, 6}
    assert taken(BlockBudget(4 / 7)) == {0, 5, 6, 1}  # of two equal ones the lower
    assert taken(BlockBudget(5 / 7)) == {0, 5, 6, 1, 4}
    assert taken(BlockBudget(1.0)) == set(range(7))
    assert taken(BlockBudget(1.0, 0.3)) == {0, 5, 6}  # they hold 0.3
    assert taken(BlockBudget(1.0, 0.31)) == {0, 5, 6, 1}
    assert taken(BlockBudget(1.0, 0.95)) == {0, 5, 6, 1, 4, 3}
    assert taken(BlockBudget(4 / 7, 0.95)) == {0, 5, 6, 1}


@pytest.mark.parametrize("held", [None, 0.5])
def test_long_lists_are_those_of_plain_loops(held: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 75 blocks, in one piece and in several; each list is the best, and names no block twice."""
    number = torch.arange(1, 75 * BLOCK + 1)[None]
    grid = Grid.of(number, number)
    assert grid is not None
    mass = torch.rand(1, 2, 75, 75, generator=torch.Generator().manual_seed(0)) ** 8
    for _ in range(2):
        lists = select_blocks(mass, grid, BlockBudget(0.4, held))
        for head in range(2):
            for own in range(75):
                count = int(lists.count[0, head, own])
                listed: list[int] = lists.listed[0, head, own, :count].tolist()
                assert len(set(listed)) == count
                expected = prefill_in_loops.chosen(mass[0, head, own].tolist(), own, 0.4, held)
                assert {*listed, own} == expected
        monkeypatch.setattr("fasa_flex.prefill.selection.rows_of_piece", lambda row_bytes, on_cuda: 7)


def test_lists_take_at_most_eight_bytes_a_pair_of_blocks_and_head() -> None:
    blocks, value, _ = CASES["whole blocks"].make()
    for budget in (BlockBudget(1.0), BlockBudget(0.5), BlockBudget(1.0, 0.9)):
        _, lists = block_sparse_attention(blocks, value, budget, pooled)
        used = sum(each.numel() * each.element_size() for each in (lists.listed, lists.count, lists.diagonal))
        assert used <= 8 * lists.count.shape[1] * 4 * 4


def test_a_wrong_estimate_is_refused() -> None:
    blocks, value, _ = CASES["whole blocks"].make()
    with raises_sentence(ValueError, r"must return \(1, 2, 2, 4, 4\), or 1 in the third place, got \(1, 2, 4\)"):
        block_sparse_attention(blocks, value, BlockBudget(0.5), lambda given: torch.zeros(1, 2, 4))


def test_a_mask_that_is_not_causal_is_refused() -> None:
    slot = torch.arange(300)
    causal = (slot <= slot[:, None])[None, None, None]

    def check(valid: Tensor) -> None:
        counts, last = valid.sum(-1)[:, 0, 0], valid[:, 0, 0, -1]
        check_causal(valid, counts, last, last.cumsum(-1))

    check(causal)
    check(causal & (slot >= 30))
    with raises_sentence(ValueError, "mask of row 1 is not causal"):
        check(torch.cat([causal, causal & (slot > slot[:, None] - 64)]))
    with raises_sentence(ValueError, "mask of row 0 is not causal"):
        check(torch.ones_like(causal))
