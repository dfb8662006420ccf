"""SnapKV, H2O and R-KV: worked examples, their published rules in plain loops, and the contracts of eviction."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from baselines import plain
from baselines.plain import Rule, forward_of, selected
from sentences import raises_sentence
from torch import Tensor

from fasa_flex.baselines import H2O, RKV, SnapKV
from fasa_flex.baselines.evicting import Evicting
from fasa_flex.core.budget import Budget

METHODS = {"snapkv": SnapKV, "h2o": H2O, "rkv": RKV}
RULES: dict[str, Callable[[], Rule]] = {"snapkv": plain.snapkv, "h2o": plain.h2o, "rkv": plain.rkv}


states = functools.partial(plain.states, spread=2.0)


def one_head(queries: list[float], keys: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Scores written out: query i has ``queries[i]`` times the first dimension, with scaling undone."""
    dim = len(keys[0])
    query = torch.zeros(1, 1, len(queries), dim)
    query[0, 0, :, 0] = torch.tensor(queries) * math.sqrt(dim)
    return query, torch.tensor(keys).view(1, 1, -1, dim)


def slots(mask: Tensor) -> list[list[int]]:
    """Of one row and head: the selected slots of each query."""
    return [row.nonzero().flatten().tolist() for row in mask[0, 0, 0]]


def test_snapkv_written_out() -> None:
    """Budget 4 of 7 keys: a window of 2 (slots 4 and 5) and one more stay beside the query's own key, slot 6.

    The window's queries weigh slots 0-3 by e^0, e^1, e^2, e^0, so slot 2 has most, and pooled over 3 neighbours slots 1
    to 3 tie: the lowest, slot 1, stays. Without pooling it is slot 2.
    """
    query, key = one_head([0, 0, 0, 0, 1, 1, 0], [[0.0], [1.0], [2.0], [0.0], [-9.0], [-9.0], [0.0]])
    forward = forward_of(query, key, Budget(4), dense=6)
    assert slots(selected(SnapKV(kernel=3), forward)) == [[1, 4, 5, 6]]
    assert slots(selected(SnapKV(kernel=1), forward)) == [[2, 4, 5, 6]]


def test_h2o_written_out() -> None:
    """Budget 4: the query's own key and the one before it, and the two heaviest of the others.

    Uniform attention in the prefill: slot 0 receives 1 + 1/2 + 1/3 + 1/4, slot 1 receives 1/2 + 1/3 + 1/4, slot 2 less,
    so the query at slot 4 finds 0, 1 and the recent 3. It gives all its attention to one key: to slot 1, and then slot
    3, with 1/4, is dropped next; or to slot 3, which has 1 + 1/4 then, and slot 1 is dropped.
    """
    for looked_at, second in ((1, [0, 1, 4, 5]), (3, [0, 3, 4, 5])):
        query, key = one_head([0, 0, 0, 0, 99, 0], [[float(slot == looked_at)] for slot in range(6)])
        assert slots(selected(H2O(), forward_of(query, key, Budget(4), dense=4))) == [[0, 1, 3, 4], second]


def test_rkv_written_out() -> None:
    """Budget 4 of 6 keys, all equally important, a window of 2 (slots 3 and 4): of slots 0-2 the least redundant stays.

    These three are the same. Slots 0 and 1 spare the latest of their likes, slot 2, and slot 2 spares slot 1: said
    again are slot 0 twice and slot 1 once. With one turned away, the other two spare each other, and 0 ties with all.
    """
    east, north, up, west = [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]
    query, key = one_head([0] * 6, [east, east, east, up, west, east])
    assert slots(selected(RKV(), forward_of(query, key, Budget(4), dense=5))) == [[2, 3, 4, 5]]
    query, key = one_head([0] * 6, [east, east, north, up, west, east])
    assert slots(selected(RKV(), forward_of(query, key, Budget(4), dense=5))) == [[0, 3, 4, 5]]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", METHODS)
def test_the_published_rule_in_plain_loops(name: str, budget: int) -> None:
    query, key = states(1, 40)
    dense = 24
    mask = selected(METHODS[name](), forward_of(query, key, Budget(budget), dense))
    for head in range(2):
        rule = RULES[name]()
        group = query[0, 2 * head : 2 * head + 2].double().numpy()
        expected = plain.kept_by(rule, group, key[0, head].double().numpy(), dense, budget)
        assert len(expected) == 40 - dense
        for slot, kept in expected.items():
            assert set(mask[0, head, 0, slot - dense].nonzero().flatten().tolist()) == kept, slot


@pytest.mark.parametrize(
    ("name", "options"),
    [("snapkv", {"window": 3, "kernel": 5}), ("rkv", {"window": 3, "kernel": 1, "mix": 0.9, "threshold": 0.2})],
)
def test_the_rule_with_other_parameters(name: str, options: dict[str, float]) -> None:
    query, key = states(1, 40, heads=1, kv_heads=1, dim=3)
    mask = selected(METHODS[name](**options), forward_of(query, key, Budget(12), 20))
    rule = {"snapkv": plain.snapkv, "rkv": plain.rkv}[name](**options)
    expected = plain.kept_by(rule, query[0].double().numpy(), key[0, 0].double().numpy(), 20, 12)
    assert [set(row) for row in slots(mask)] == list(expected.values())


@pytest.mark.parametrize("name", METHODS)
def test_heads_with_budgets_of_their_own_do_not_know_each_other(name: str) -> None:
    query, key = states(1, 60)
    together = selected(METHODS[name](), forward_of(query, key, Budget((4, 25)), 30))
    for head, budget in enumerate((4, 25)):
        own = query[:, 2 * head : 2 * head + 2], key[:, head : head + 1]
        alone = selected(METHODS[name](), forward_of(*own, Budget(budget), 30))
        assert torch.equal(together[:, head : head + 1], alone)


BUDGETS = [Budget(6), Budget(0.3), Budget((4, 9)), Budget(6, n_sink=2, n_recent=2), Budget(5, n_sink=4)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met_and_nothing_dropped_comes_back(name: str, budget: Budget) -> None:
    query, key = states(2, 40)
    forward = forward_of(query, key, budget, [10, 25])
    mask = selected(METHODS[name](), forward)[:, :, 0]
    counts = budget.of(forward.valid.sum(-1))[:, :, 0].expand(2, 2, -1)[..., forward.first :]
    sparse = forward.sparse[:, None, forward.first :].expand(2, 2, -1)
    assert torch.equal(mask.sum(-1)[sparse], counts[sparse])
    for row, start in enumerate((10, 25)):
        sets = mask[row, :, start - 10 :]
        came_back = sets[:, 1:] & ~sets[:, :-1]
        came_back[:, torch.arange(39 - start), torch.arange(start + 1, 40)] = False  # a query's own key is new
        assert not came_back.any()
        assert sets[:, torch.arange(40 - start), torch.arange(start, 40)].all()
        assert sets[..., : budget.n_sink].all()


def test_a_dropped_key_stays_dropped_although_a_later_query_looks_for_it() -> None:
    """The prefill ignores slot 1; every later query points straight at it."""
    for scorer in (SnapKV(), H2O(), RKV(mix=1.0)):
        query, key = states(1, 24, heads=1, kv_heads=1, seed=2)
        key[0, 0, 1] = 0.0
        key[0, 0, 1, 0] = 50.0
        query[0, 0, :16, 0] = -abs(query[0, 0, :16, 0]) - 5
        query[0, 0, 16:, 0] = 50.0
        mask = selected(scorer, forward_of(query, key, Budget(8), 16))
        assert not mask[..., 1].any()


@pytest.mark.parametrize("cut", [1, 9, 16, 21, 39])
@pytest.mark.parametrize("name", METHODS)
def test_parts_and_a_static_buffer_equal_one_forward(name: str, cut: int) -> None:
    """The same sets whether the queries come at once, in two forwards, or one by one, in a buffer of any length."""
    query, key = states(2, 40)
    dense, budget = [18, 30], Budget(7)
    whole = selected(METHODS[name](), forward_of(query, key, budget, dense))
    free = torch.cat([key, torch.full_like(key, 1e4)], dim=2)
    for buffer in (None, free):
        for ends in ([cut, 40], [16, *range(17, 41)]):
            scorer, start, parts = METHODS[name](), 0, []
            for end in ends:
                keys = key[:, :, :end] if buffer is None else buffer
                mask = selected(scorer, forward_of(query[:, :, start:end], keys, budget, dense, first_slot=start))
                parts.append(torch.nn.functional.pad(mask[..., :40], (0, max(0, 40 - mask.shape[-1]))))
                start = end
            assert torch.equal(torch.cat(parts, dim=3)[:, :, :, -22:], whole)


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    lengths, dense, budget = (40, 29, 33), (20, 12, 9), Budget(7)
    rows = [states(1, length, seed=length) for length in lengths]
    for left in (True, False):
        query, key = torch.full((3, 4, 44, 8), 9.0), torch.full((3, 2, 44, 8), -9.0)
        mask = torch.zeros(3, 44, dtype=torch.bool)
        begins = [44 - length if left else 0 for length in lengths]
        for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            inside = slice(begin, begin + length)
            query[row, :, inside], key[row, :, inside], mask[row, inside] = rows[row][0][0], rows[row][1][0], True
        starts = [begin + start for begin, start in zip(begins, dense, strict=True)]
        forward = forward_of(query, key, budget, starts, mask)
        padded = selected(METHODS[name](), forward)
        for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            alone = selected(METHODS[name](), forward_of(*rows[row], budget, dense[row]))
            at = begin + dense[row] - forward.first
            got = padded[row, ..., at : at + length - dense[row], begin : begin + length]
            assert torch.equal(got, alone[0])


@pytest.mark.parametrize("name", METHODS)
def test_autocast_does_not_round_what_ranks(name: str) -> None:
    query, key = states(1, 60)
    forward = forward_of(query, key, Budget(12), 20)
    plainly = selected(METHODS[name](), forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selected(METHODS[name](), forward), plainly)


def test_dense_queries_behind_sparse_ones_are_learned_from() -> None:
    """A second turn's prompt adds keys beyond the budget; the next sparse query brings them down to it."""
    query, key = states(1, 60)
    for scorer in (SnapKV(), H2O(), RKV()):
        first = selected(scorer, forward_of(query[:, :, :30], key[:, :, :30], Budget(8), 20))[0, :, 0, -1]
        assert selected(scorer, forward_of(query[:, :, 30:50], key[:, :, :50], Budget(8), 60)).shape[3] == 0
        last = selected(scorer, forward_of(query[:, :, 50:], key, Budget(8), 50))[0, :, 0]
        assert (last.sum(-1) == 8).all()
        assert not (last[:, :, :30] & ~first[:, None]).any()


def test_a_forward_that_does_not_continue_is_refused() -> None:
    query, key = states(3, 30)
    changes = {
        "cropped": lambda: forward_of(query[:, :, :1], key[:, :, :16], Budget(5)),
        "another batch": lambda: forward_of(query[:2, :, :1], key[:2, :, :21], Budget(5)),
        "reordered": lambda: forward_of(query[:, :, :1], key[[1, 0, 2], :, :21], Budget(5)),
        "ahead": lambda: forward_of(query[:, :, :1], key[:, :, :23], Budget(5)),
    }
    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"followed 0 slots.*begin the sequence anew"):
            method().follow(forward_of(query[:, :, :1], key, Budget(5)))
        for change in changes.values():
            scorer = method()
            scorer.follow(forward_of(query[:, :, :20], key[:, :, :20], Budget(5), 20))
            with raises_sentence(RuntimeError, match=r"followed 20 slots, but the cache.*without beam search"):
                scorer.follow(change())
            scorer.follow(forward_of(query[:, :, :20], key[:, :, :20], Budget(5), 9))  # a new sequence may begin


def test_forced_tokens_must_leave_room_for_the_query() -> None:
    query, key = states(1, 20)
    with pytest.raises(ValueError, match="n_sink = 5 and n_recent = 0 leave no room in a budget of 5"):
        H2O().follow(forward_of(query, key, Budget(5, n_sink=5), 10))


def test_compiling_is_refused() -> None:
    query, key = states(1, 20)
    follow = torch.compile(H2O().follow, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="remembers dropped keys and does not compile"):
        follow(forward_of(query, key, Budget(5), 10))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SnapKV(window=0), "window must be an integer of at least 1, got 0"),
        (lambda: SnapKV(kernel=4), "kernel must be odd.*got 4"),
        (lambda: RKV(kernel=0), "kernel must be an integer of at least 1, got 0"),
        (lambda: RKV(mix=1.5), r"mix weighs.*\[0, 1\], got 1.5"),
    ],
)
def test_parameters_that_fit_nothing_are_refused(make: Callable[[], Evicting], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
