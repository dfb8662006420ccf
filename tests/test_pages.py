"""Pages beside a paged cache: packed keys and states by block, the book of tables, and the kernels on pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.backends.triton.dispatch import decode_pages_by_kernels
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion
from fasa_flex.core.config import GroupReduce, PackedDtype
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.continuous_batching import Pages, Request
from fasa_flex.paged.attention import attend_pages, packed_rows, whole_rows
from fasa_flex.paged.book import Book
from fasa_flex.paged.pages import PackedPages, States, write_states

PAGE, STRIDE, BLOCKS, HEADS, DIM = 16, 40, 30, 2, 16
CPU = torch.device("cpu")


@pytest.fixture
def pages() -> Pages:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, BLOCKS * STRIDE, HEADS, DIM, generator=generator)
    return Pages(keys, values, PAGE, STRIDE, {"a": [7, 3, 20, 4, 9, 11], "b": [1, 2, 6, 0, 5, 8]}, BLOCKS - 1)


def filled(
    pages: Pages, lengths: tuple[int, ...], dtype: PackedDtype | None
) -> tuple[DominantChunks, Call, tuple[Tensor, Tensor]]:
    """One decoded token for requests of these lengths, with packed keys and states beside the pages.

    Returns the scorer, the call, and the arguments of `attend_pages` behind the pages.
    """
    generator = torch.Generator().manual_seed(1)
    dims = torch.stack([torch.randperm(DIM, generator=generator)[:8] for _ in range(HEADS)])
    scorer = DominantChunks(dims, torch.randn(HEADS, DIM, generator=generator), dtype=dtype)
    requests = [Request(name, 0, 0, n, n) for name, n in zip("ab", lengths, strict=True)]
    book, packed, states = Book(PAGE, CPU), PackedPages(pages, scorer), States(pages, first_order=True)
    book.plan([Request("b", 0, 0, 1, 1)], pages.tables)  # its state comes first
    plan = book.plan(requests, pages.tables)
    packed.write(pages.keys[plan.new.rows(STRIDE)], plan.new)
    states.begin(pages, plan, book.slots)
    states.advance(pages, plan)
    table = torch.tensor([pages.tables[name] for name in "ab"])
    valid = (torch.arange(table.shape[1] * PAGE) < torch.tensor(lengths)[:, None])[:, None, None, None]
    query = torch.randn(2, 2 * HEADS, 1, DIM, generator=generator)
    key, value = (torch.empty(DIM).expand(2, HEADS, valid.shape[-1], -1) for _ in range(2))
    completion = Completion(0.75, states.all)
    softmax = Softmax(DIM**-0.5)
    settings = (scorer, valid, Budget(24, None, None), "softmax", softmax, packed.keys, None, None, completion)
    call = Call(query, key, value, *settings)  # type: ignore[arg-type]  # the tuple's types are merged
    return scorer, call, (table, plan.slots)


def whole(call: Call, pages: Pages, table: Tensor) -> Call:
    """The same call with all keys and values gathered, packed and summed anew."""
    key, value = (whole_rows(states, table, pages, call.valid) for states in (pages.keys, pages.values))
    return replace(call, key=key, value=value, packed_keys=None, completion=Completion(0.75, None))


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("group_reduce", ["softmax", "softmax_exact", "max", "none"])
@pytest.mark.parametrize("lengths", [(96, 70), (33, 95)])
def test_attention_to_pages_is_attention_to_gathered_keys(
    pages: Pages, dtype: PackedDtype | None, group_reduce: GroupReduce, lengths: tuple[int, ...]
) -> None:
    _, call, places = filled(pages, lengths, dtype)
    call.group_reduce = group_reduce
    expected = sparse_attention(whole(call, pages, places[0]), "gather")
    torch.testing.assert_close(attend_pages(call, pages, *places, "auto"), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, "int4"])
@pytest.mark.parametrize("group_reduce", ["softmax", "softmax_exact", "max"])
def test_the_kernels_read_pages_through_the_table(
    pages: Pages, dtype: PackedDtype | None, group_reduce: GroupReduce
) -> None:
    """In Triton's interpreter; the second request has fewer keys than the budget."""
    pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch only")
    _, call, (table, states) = filled(pages, (90, 20), dtype)
    call.group_reduce = group_reduce
    wide = torch.nn.functional.pad(table, (0, 3), value=-1)[:, : table.shape[1]]  # a view, as of a plan's table
    expected = attend_pages(call, pages, table, states, "gather")
    got = decode_pages_by_kernels(call, pages.keys, pages.values, wide, states, pages.stride)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_a_kernel_writes_new_tokens_to_pages(
    pages: Pages, dtype: PackedDtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch only")
    scorer, _, _ = filled(pages, (96, 90), dtype)
    new = torch.randn(2, 37, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    found = []
    for serves in (False, True):
        monkeypatch.setattr("fasa_flex.paged.pages.serves_pages", lambda *_, serves=serves: serves)
        own = pages._replace(keys=pages.keys.clone(), values=pages.values.clone())
        packed, plan = PackedPages(own, scorer), Book(PAGE, CPU).plan([Request("a", 0, 50, 37, 60)], pages.tables)
        write_states(own, packed, *new, plan.new, written=False)
        assert own.keys.ne(pages.keys).any(2).any(1).sum() == 37
        found.append((own.keys, own.values, packed.keys.tiles, packed.keys.scales))
    for plain, ours in zip(*found, strict=True):
        assert (plain is ours is None) or torch.equal(plain, ours)


@pytest.mark.parametrize("first_order", [True, False])
def test_a_kernel_covers_requests_in_pages(pages: Pages, first_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that complete their blocks at different steps, and one whose blocks have moved."""
    pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch only")
    found = []
    for serves in (False, True):
        monkeypatch.setattr("fasa_flex.paged.pages.serves_pages", lambda *_, serves=serves: serves)
        states, book, tables = (
            States(pages, first_order),
            Book(PAGE, CPU),
            {k: list(v) for k, v in pages.tables.items()},
        )
        for past, new in ((0, 62), (62, 2), (64, 30)):
            requests = [Request("b", 0, max(0, past - 10), new, 90), Request("a", 0, past, new, 90)]
            if past == 64:
                tables["b"][0] = 22
            elif not past:
                requests[0] = requests[0]._replace(new=52)
            plan = book.plan(requests, tables)
            states.begin(pages, plan, book.slots)
            states.advance(pages, plan)
        assert states.all.covered[1:3].unique().tolist() == [64]
        found.append(states.all.tensors)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_a_request_in_turns_is_packed_and_summed_as_at_once(pages: Pages) -> None:
    scorer, _, _ = filled(pages, (96, 90), "int4")
    once, in_turns = PackedPages(pages, scorer), PackedPages(pages, scorer)
    sums, in_turn = States(pages, True), States(pages, True)
    for packed, states, steps in ((once, sums, (90,)), (in_turns, in_turn, (30, 40, 1, 1, 18))):
        book, past = Book(PAGE, CPU), 0
        for new in steps:
            plan = book.plan([Request("b", 0, past, new, 90)], pages.tables)
            assert plan.again is None
            packed.write(pages.keys[plan.new.rows(STRIDE)], plan.new)
            states.begin(pages, plan, book.slots)
            states.advance(pages, plan)
            past += new
    table = torch.tensor([pages.tables["b"]])
    rows = [packed_rows(each.keys, table).tiles[:, :, :90] for each in (once, in_turns)]
    assert torch.equal(*rows)
    for a, b in zip(sums.all.tensors, in_turn.all.tensors, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def again(book: Book, tables: dict[str, list[int]], name: str, past: int, new: int = 1) -> list[tuple[int, int]]:
    """Block and offset of the tokens that a forward packs again."""
    plan = book.plan([Request(name, 0, past, new, 10)], tables)
    return [] if plan.again is None else list(zip(plan.again.blocks.tolist(), plan.again.offsets.tolist(), strict=True))


def test_the_book_packs_again_only_what_it_does_not_know() -> None:
    book = Book(4, CPU)
    tables = {"a": [3, 5, 2], "b": [7]}
    assert again(book, tables, "a", 0, 10) == []
    assert again(book, tables, "a", 10) == []
    tables["a"][0] = 9  # the manager has found an equal block
    assert again(book, tables, "a", 11) == [(9, 0), (9, 1), (9, 2), (9, 3)]
    tables["a"].append(6)
    assert again(book, tables, "a", 12) == []
    tables["fork"] = [9, 5, 2, 8]
    assert again(book, tables, "fork", 13) == [(b, o) for b in (9, 5, 2) for o in range(4)] + [(8, 0)]
    del tables["a"]
    assert again(book, tables, "b", 0) == []  # "a" is away for one forward
    tables["a"] = [9, 5, 2, 6]
    assert len(again(book, tables, "a", 13)) == 13


def test_slots_of_states_are_used_again() -> None:
    book, tables = Book(4, CPU), {name: [at] for at, name in enumerate("abcd")}
    slots = {}
    for name in "abc":
        slots[name] = book.plan([Request(name, 0, 0, 2, 2)], tables).slots.item()
    assert sorted(slots.values()) == [1, 2, 3]
    del tables["b"]
    plan = book.plan([Request("d", 0, 0, 2, 2)], tables)
    assert plan.slots.tolist() == [slots["b"]]
    assert plan.begun is not None
    assert plan.begun.tolist() == [slots["b"]]
    assert book.slots == 4


def test_a_plan_of_several_requests() -> None:
    """The second one begins in the middle of a block; states take in its tokens 4 to 63."""
    book, tables = Book(4, CPU), {"a": [7, 1], "b": list(range(40, 20, -1))}
    book.plan([Request("a", 0, 0, 3, 3), Request("b", 3, 0, 62, 62)], tables)
    plan = book.plan([Request("b", 0, 62, 5, 62), Request("a", 5, 3, 2, 3)], tables)
    assert plan.again is plan.begun is None
    assert plan.table[:, :2].tolist() == [[40, 39], [7, 1]]
    assert plan.table.shape == (2, 17)
    assert plan.new.blocks.tolist() == [25, 25, 24, 24, 24, 7, 1]
    assert plan.new.offsets.tolist() == [2, 3, 0, 1, 2, 3, 0]
    assert plan.new.rows(10).tolist() == [252, 253, 240, 241, 242, 73, 10]
    (cover,) = plan.covers
    assert cover.slots.tolist() == [plan.slots[0]]
    assert cover.covered.tolist() == [64]
    assert cover.places.rows(4).tolist() == [4 * (40 - token // 4) + token % 4 for token in range(4, 64)]
