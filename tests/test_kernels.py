"""The Triton kernels in Triton's interpreter, against the oracle; on a GPU evals/bench/check_cuda.py compares them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from cases import generator, integers, pick_chunks
from generation import Ids, profile_of
from sentences import raises_sentence
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, enable, fasa_attention
from fasa_flex.backends.table import BACKENDS, ORDER
from fasa_flex.backends.triton import dispatch
from fasa_flex.backends.triton.dispatch import decode_by_kernels, in_rows
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion, CompletionState
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.resident_rows import ResidentRows
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import Marks, valid_keys
from fasa_flex.core.softmax import Softmax

pytest.importorskip("triton")
ops, attention, dense, ranking = (
    import_module(f"fasa_flex.backends.triton.{name}") for name in ("decode", "attention", "dense", "tip")
)

FUNCTIONS = ("sparse_decode", "select_slots", "hold_slots", "attend_slots")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's log(0) of masked lanes


@dataclass(frozen=True)
class Step:
    """One decode step."""

    length: int
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    n_tip: int = 2
    n_fac: int | float = 6
    how: Any = "max"
    softcap: float | None = None
    sinks: bool = False
    forced: int = 0
    masked: float = 0.0
    limit: int = 2
    packed: Any = None
    mean: bool = False
    weighted: bool = False
    strength: float | None = None
    sharp: float = 1.0  # factor of the query


PLAIN = {
    "a search over tiles": Step(1100, n_fac=16),
    "a budget of most keys": Step(2100, n_fac=1500, kv_heads=1),
    "a budget of most keys, tied": Step(2100, n_fac=1500, kv_heads=1, limit=1, how="softmax"),
    "a share": Step(700, batch=2, n_fac=0.07, masked=0.3, how="softmax"),
    "a share of fewer keys than are forced": Step(60, batch=2, n_fac=0.05, forced=3, masked=0.2),
    "a large share": Step(300, batch=2, n_fac=0.5, forced=3, masked=0.3, how="mean"),
    "no more tiles than budget": Step(200),
    "more budget than keys": Step(5, n_fac=16),
    "a single key": Step(1),
    "exact softmax": Step(700, batch=2, group=4, how="softmax_exact"),
    "softmax": Step(700, batch=2, group=3, how="softmax"),
    "softmax, a single key": Step(1, how="softmax"),
    "mean": Step(300, group=3, how="mean", n_fac=16),
    "one query head": Step(90, group=1, how="softmax"),
    "all scores equal": Step(600, limit=0),
    "all weights equal": Step(600, limit=0, how="softmax"),
    "padding and an empty row": Step(130, batch=2, masked=0.4),
    "softmax, padding and an empty row": Step(130, batch=2, masked=0.4, how="softmax"),
    "sinks and recent": Step(90, forced=2, masked=0.3, how="softmax"),
    "softcap": Step(100, softcap=2.0, group=4),
    "learned sinks": Step(100, sinks=True, how="softmax"),
    "learned sinks and an empty row": Step(70, batch=2, masked=0.3, sinks=True, softcap=2.0),
    "an odd width": Step(70, dim=24, n_tip=3, n_fac=7),
}
FULL: dict[str, Any] = {"packed": "int4", "mean": True, "how": "softmax", "strength": 0.75}
WHOLE = {
    "the defaults": Step(301, batch=2, group=3, n_fac=24, forced=3, **FULL),
    "the defaults, a share": Step(801, batch=2, group=3, n_fac=0.03, forced=3, sinks=True, softcap=2.0, **FULL),
    "four bits, an odd count": Step(99, dim=24, n_tip=3, packed="int4"),
    "four bits, one chunk": Step(99, n_tip=1, packed="int4", mean=True),
    "four bits, exact softmax": Step(99, packed="int4", how="softmax_exact", weighted=True),
    "eight bits": Step(99, packed="int8", mean=True, weighted=True, how="softmax"),
    "a mean key under max": Step(99, group=4, mean=True),
    "a mean key under mean": Step(99, group=4, mean=True, how="mean", packed="int4"),
    "a mean key under a cap": Step(99, group=4, mean=True, how="softmax", packed="int8", softcap=1.5),
    "completed": Step(200, group=4, how="softmax_exact", strength=0.5),
    "completed, max": Step(200, how="max", strength=0.75, mean=True, packed="int4"),
    "completed, mean": Step(200, how="mean", strength=0.75),
    "completed, one query head": Step(200, group=1, **FULL),
    "completed by the mean value": Step(200, **{**FULL, "strength": 0.0}),
    "completed under a cap": Step(200, softcap=1.5, group=3, **FULL),
    "completed beside learned sinks": Step(200, sinks=True, weighted=True, **FULL),
    "completed, padding and an empty row": Step(200, batch=3, masked=0.4, sinks=True, **FULL),
    "completed where nothing is covered": Step(60, **FULL),
    "completed with all selected": Step(80, n_fac=90, **FULL),
    "weights beyond the range of floats": Step(300, batch=2, group=3, n_fac=24, masked=0.1, sharp=20.0, **FULL),
    "weights far beyond it": Step(300, group=3, n_fac=24, sharp=100.0, **{**FULL, "packed": "int8"}),
    "exact weights beyond it": Step(300, n_fac=24, sharp=60.0, how="softmax_exact", strength=0.75),
}
STEPS = {**PLAIN, **WHOLE}


@pytest.fixture(autouse=True)
def rows_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed keys as on a GPU."""
    monkeypatch.setattr("fasa_flex.core.packed_keys.tile_of", lambda device: 1)


def assert_equals_the_oracle(step: Step, held: bool, dtype: torch.dtype = torch.float32) -> None:
    heads = step.kv_heads * step.group
    q = step.sharp * integers(step.batch, heads, 1, step.dim, seed=1, limit=step.limit)
    k = integers(step.batch, step.kv_heads, step.length, step.dim, seed=2, limit=step.limit)
    v = torch.randn(step.batch, step.kv_heads, step.length, step.dim, generator=generator(3))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    chunks = pick_chunks(step.kv_heads, step.n_tip, dim=step.dim)
    sinks = torch.randn(heads, generator=generator(4)) if step.sinks else None
    real = torch.rand(step.batch, step.length, generator=generator(5)) >= step.masked
    if step.masked:
        real[0] = step.batch == 1
    mean = torch.randn(step.kv_heads, step.dim, generator=generator(6)) if step.mean else None
    weights = 0.5 + torch.rand(step.kv_heads, step.n_tip, generator=generator(7)) if step.weighted else None
    by_dim = None if weights is None else weights.repeat_interleave(2, 1)
    scorer = DominantChunks(chunks.flatten(1), mean, by_dim, step.packed)
    packed = PackedKeys.of(scorer.pack(k), step.packed, step.length + 3)
    valid, budget = real[:, None, None, None], Budget(step.n_fac, step.forced, step.forced)
    softmax, completion = Softmax(step.dim**-0.5, step.softcap, sinks), None
    if step.strength is not None:
        state = CompletionState.empty(k, v, step.strength != 0.0)
        state.advance(k, v, real, real.cumsum(-1), step.length)
        completion = Completion(step.strength, state)
    rows = ResidentRows.empty(k, v, budget.widest(step.length)) if held else None
    marks = Marks.of(valid, budget, samples=step.how == "softmax" or completion is not None)
    out = decode_by_kernels(Call(q, k, v, scorer, valid, budget, step.how, softmax, packed, rows, marks, completion))
    expected = oracle.fasa(
        *(x.double().numpy() for x in (q, k, v)),
        chunks.numpy(),
        n_fac=step.n_fac,
        n_sink=step.forced,
        n_recent=step.forced,
        group_reduce=step.how,
        key_mask=real.numpy(),
        softcap=step.softcap,
        sinks=None if sinks is None else sinks.double().numpy(),
        mean_key=None if mean is None else mean.double().numpy(),
        weights=None if weights is None else weights.double().numpy(),
        bits={"int4": 4, "int8": 8}.get(step.packed),
        strength=step.strength,
    )
    atol = 1e-5 if dtype == torch.float32 else 4e-3
    np.testing.assert_allclose(out.numpy(), expected.out, atol=atol, rtol=1e-6 * step.sharp)


@pytest.mark.parametrize("held", [False, True], ids=["at once", "FASA-M"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_decode_equals_the_oracle(step: Step, held: bool) -> None:
    assert_equals_the_oracle(step, held)


@pytest.mark.parametrize(
    "step",
    [
        STEPS["a search over tiles"],
        STEPS["all weights equal"],
        Step(1100, batch=2, n_fac=16, forced=3, masked=0.4, **FULL),
        Step(900, batch=2, n_fac=300, forced=3, masked=0.2, limit=1),
        Step(90, forced=2, masked=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("held", [False, True], ids=["at once", "FASA-M"])
def test_long_lists_select_the_same(step: Step, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for long rows and large budgets: programs list keys of many blocks, and search many chunks of the list.

    The last step's orders span 32 bits, from keys of no use to those that are forced.
    """
    for name, value in {"LIST_TILES": 4, "LIST_KEYS": 32, "LIST_PROGRAMS": 4}.items():
        monkeypatch.setattr(ranking, name, value)
    for module in (ops, attention):
        monkeypatch.setattr(module, "SELECT_CHUNK", 16)
    assert_equals_the_oracle(step, held)


@pytest.mark.slow
def test_a_budget_of_more_keys_than_a_part_of_an_integer_counts() -> None:
    """Up to 65535 listed keys the search counts four orders in one integer of 64 bits."""
    length, wanted = 66600, 66000
    q, k = torch.ones(1, 1, 1, 16), integers(1, 1, length, 16, seed=2, limit=1000)
    scorer, everyone = DominantChunks(pick_chunks(1, 2).flatten(1)), torch.ones(1, 1, 1, 1, length, dtype=torch.bool)
    packed = PackedKeys.of(scorer.pack(k))
    query, fields, _ = dispatch._arguments_of(
        Call(q, k, k, scorer, everyone, Budget(wanted), "max", Softmax(1.0), packed, None, None, None)
    )
    chosen = ops.select_slots(query, *fields)[0][0].long()
    scores = packed.rows(length)[0, 0].sum(1)
    assert chosen.equal(scores.argsort(descending=True, stable=True)[:wanted].sort().values)


@pytest.mark.parametrize(
    "step",
    [
        Step(1100, batch=2, n_fac=16, forced=3, masked=0.4, **FULL),
        Step(1100, batch=2, group=5, n_fac=20, how="softmax_exact", strength=0.75, packed="int8"),
        Step(1027, group=4, n_fac=16, how="mean", packed="int4"),
        Step(600, group=3, n_fac=16, forced=2, dim=24, n_tip=3, packed="int4", how="softmax"),
    ],
    ids=str,
)
def test_programs_of_several_blocks_rank_the_same(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for long rows: a program ranks many blocks, and sums many of the keys that give the unit of weights."""
    for name, value in {"SCORE_PROGRAMS": 3, "SUM_BLOCK": 32, "MOST_SUMS": 3}.items():
        monkeypatch.setattr(ranking, name, value)
    assert_equals_the_oracle(step, held=False)


HALF: dict[str, Any] = {**FULL, "mean": False}  # less a mean key, codes would be those of rounded numbers


@pytest.mark.parametrize(
    "step",
    [
        Step(301, batch=2, group=3, n_fac=24, forced=3, masked=0.3, **HALF),
        Step(1027, group=4, n_fac=16, how="mean", packed="int4"),
        Step(99, group=1, dim=24, n_tip=3, packed="int4"),
        Step(301, group=7, n_fac=0.1, how="softmax_exact", packed="int4"),
        Step(200, group=8, sinks=True, softcap=1.5, weighted=True, how="softmax", packed="int8", strength=0.75),
        Step(300, group=3, n_fac=24, masked=0.1, sharp=60.0, **{**HALF, "packed": "int8"}),
    ],
    ids=str,
)
def test_half_precision_multiplies_integers(step: Step) -> None:
    """Ties stay ties: the queries are powers of two times their largest number."""
    assert_equals_the_oracle(step, held=False, dtype=torch.float16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [1, 4, 6])
def test_integer_products_rank_as_exact_ones_but_for_near_ties(bits: int, group: int) -> None:
    """A query's numbers are rounded to a 65000th of its largest one."""
    draw = generator(bits + group)
    q, k = (torch.randn(1, heads, length, 128, generator=draw).half() for heads, length in ((group, 1), (1, 3000)))
    scorer = DominantChunks(pick_chunks(1, 32, dim=128).flatten(1), dtype=f"int{bits}")  # type: ignore[arg-type]
    packed, everyone = PackedKeys.of(scorer.pack(k), scorer.dtype), torch.ones(1, 1, 1, 1, 3000, dtype=torch.bool)
    call = Call(q, k, k, scorer, everyone, Budget(100), "max", Softmax(0.1), packed, None, None, None)
    query, fields, _ = dispatch._arguments_of(call)
    chosen = ops.select_slots(query, *fields)[0][0].long()
    exact = (scorer.of_query(q)[0].double() @ packed.rows(3000)[0].double().mT).amax(-2)[0]
    others = exact.clone()
    others[chosen] = -torch.inf
    assert exact[chosen].min() > others.max() - 1e-4 * exact.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_read_behind_the_last_key_is_not_ranked(bits: int, dtype: torch.dtype) -> None:
    """A capacity that is a multiple of 16 is read to its end."""
    draw = generator(bits)
    q, k = (torch.randn(2, heads, length, 16, generator=draw).to(dtype) for heads, length in ((6, 1), (2, 1005)))
    scorer, valid = (
        DominantChunks(pick_chunks(2, 4).flatten(1), dtype=f"int{bits}"),
        valid_keys(1, 1005, None, k.device),
    )  # type: ignore[arg-type]
    marks = Marks.of(valid, Budget(20), samples=True)

    def attended(capacity: int) -> Tensor:
        packed = PackedKeys.of(scorer.pack(k), scorer.dtype, capacity)
        assert packed.scales is not None
        packed.tiles[:, :, 1005:], packed.scales[:, :, 1005:] = 119, torch.nan
        return decode_by_kernels(Call(q, k, k, scorer, valid, Budget(20), "softmax", Softmax(1.0), packed, None, marks))

    assert attended(1008).equal(attended(1005))


def test_int8_keys_are_scored_with_their_scales() -> None:
    """Keys of very different lengths: without the scales, others would be selected."""
    q, k = integers(1, 2, 1, 16, seed=1), integers(1, 1, 80, 16, seed=2)
    k = k * torch.logspace(-2, 2, 80)[None, None, torch.randperm(80, generator=generator(3)), None]
    v, chunks = torch.randn(1, 1, 80, 16, generator=generator(4)), pick_chunks(1, 3)
    scorer = DominantChunks(chunks.flatten(1), dtype="int8")
    packed, everyone = PackedKeys.of(scorer.pack(k), "int8"), torch.ones(1, 1, 1, 1, 80, dtype=torch.bool)
    call = (everyone, Budget(5), "max", Softmax(0.25), packed, None, None, None)
    out = decode_by_kernels(Call(q, k, v, scorer, *call))
    held = k.clone()
    held[..., scorer.dims[0]] = packed.rows(80)
    ranked = oracle.fasa(*(x.double().numpy() for x in (q, held, v)), chunks.numpy(), n_fac=5)
    rows_of = ranked.selected[0, 0, 0]
    for head in range(2):
        expected = oracle.attend(*(x.double().numpy() for x in (q[0, head, 0], k[0, 0], v[0, 0])), rows_of, 0.25)
        np.testing.assert_allclose(out[0, head, 0].numpy(), expected, atol=1e-5)


def test_a_key_far_above_the_sample_is_ranked() -> None:
    """Its weight would overflow; the ranking is in the log domain."""
    q, k = torch.ones(1, 2, 1, 16), integers(1, 1, 400, 16, seed=2)
    k[0, 0, 5], k[0, 0, 6] = 200.0, 201.0
    scorer, valid = DominantChunks(pick_chunks(1, 2).flatten(1)), torch.ones(1, 1, 1, 1, 400, dtype=torch.bool)
    marks, packed = Marks.of(valid, Budget(1), samples=True), PackedKeys.of(scorer.pack(k))
    assert marks.sample is not None
    assert not set(marks.sample.flatten().tolist()) & {5, 6}
    call = (valid, Budget(1), "softmax", Softmax(1.0), packed, None, marks, None)
    out = decode_by_kernels(Call(q, k, k, scorer, *call))
    assert torch.equal(out, k[:, :, 6:7].expand_as(out))


@pytest.mark.parametrize("how", ["softmax", "softmax_exact", "max"])
def test_a_key_that_is_no_number_shows(how: Any) -> None:
    q, k = torch.ones(1, 2, 1, 16), integers(1, 1, 400, 16, seed=2)
    k[0, 0, 5] = torch.nan
    scorer, valid = DominantChunks(pick_chunks(1, 2).flatten(1)), torch.ones(1, 1, 1, 1, 400, dtype=torch.bool)
    call = Call(q, k, k, scorer, valid, Budget(3), how, Softmax(1.0), PackedKeys.of(scorer.pack(k)))
    assert decode_by_kernels(call).isnan().all()


@pytest.mark.parametrize("how", ["softmax", "softmax_exact", "max", "mean"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_query_that_is_no_number_leaves_its_group_the_first_keys(how: Any, odd: float) -> None:
    """As in other backends: all keys' scores are NaN, also where queries are multiplied as integers."""
    q, k = torch.ones(1, 3, 1, 16).half(), integers(1, 1, 400, 16, seed=2).half()
    scorer, valid = DominantChunks(pick_chunks(1, 2).flatten(1), dtype="int4"), torch.ones(1, 1, 1, 1, 400).bool()
    q[0, 1, 0, scorer.dims[0, 0]] = odd
    call = Call(q, k, k, scorer, valid, Budget(3), how, Softmax(1.0), PackedKeys.of(scorer.pack(k), "int4"))
    out = decode_by_kernels(call)
    assert out[0, 1].isnan().all()
    for head in (0, 2):
        expected = oracle.attend(*(x.double().numpy() for x in (q[0, head, 0], k[0, 0], k[0, 0])), range(3), 1.0)
        np.testing.assert_allclose(out[0, head, 0].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize(
    "step",
    [Step(70), Step(1100, batch=2, group=3, masked=0.4), Step(90, group=1, dim=24, softcap=2.0), Step(100, sinks=True)],
    ids=["one part", "many parts, padding and an empty row", "softcap", "learned sinks"],
)
def test_dense_decode_equals_the_oracle_with_a_budget_for_all_keys(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "PROGRAMS", 16)
    heads = step.kv_heads * step.group
    q = integers(step.batch, heads, 1, step.dim, seed=1, limit=step.limit)
    k = integers(step.batch, step.kv_heads, step.length, step.dim, seed=2, limit=step.limit)
    v = torch.randn(step.batch, step.kv_heads, step.length, step.dim, generator=generator(3))
    sinks = torch.randn(heads, generator=generator(4)) if step.sinks else None
    real = torch.rand(step.batch, step.length, generator=generator(5)) >= step.masked
    if step.masked:
        real[0] = False
    out = dense.dense_decode(q, k, v, in_rows(real), step.dim**-0.5, step.softcap, sinks)
    expected = oracle.fasa(
        *(x.double().numpy() for x in (q, k, v)),
        pick_chunks(step.kv_heads, step.n_tip, dim=step.dim).numpy(),
        n_fac=step.length,
        key_mask=real.numpy(),
        softcap=step.softcap,
        sinks=None if sinks is None else sinks.double().numpy(),
    )
    np.testing.assert_allclose(out.numpy(), expected.out, atol=1e-5)


def test_held_rows_are_the_selected_ones_step_after_step() -> None:
    """Selections that change in part, one with fewer slots, and a cache that was rewound and written anew."""
    rows, kv_heads, length, wanted = 4, 2, 200, 7
    k = torch.randn(rows // kv_heads, kv_heads, length, 16, generator=generator(1))
    v = torch.randn(rows // kv_heads, kv_heads, length, 8, generator=generator(2))
    held = ResidentRows.empty(k[:, :, :0], v[:, :, :0], wanted, torch.tensor(length))
    chosen = [slots_of(rows, wanted, limit=30, seed=step) for step in range(6)]
    chosen[2][1, 3:], chosen[4][1, ::2] = -1, -1  # rows with fewer keys than budget, in whatever order
    chosen[5][:, -1] = length - 1
    fetched = []
    for step, slots in enumerate([*chosen, chosen[5]]):
        if step == 6:
            k[:, :, -1], v[:, :, -1] = 0.5, -0.5  # the last token is another one, and held already
        fresh = held.slots.clone().view(rows, wanted), held.keys.clone(), held.values.clone()
        places = ops.hold_slots(k, v, slots, held.slots, held.places, held.keys, held.values, held.length)
        real = slots >= 0
        assert torch.equal(places >= 0, real)
        for states, found in ((k, held.keys), (v, held.values)):
            expected = states.flatten(0, 1).gather(1, spread(slots, states))
            assert torch.equal(expected[real], found.flatten(0, 1).gather(1, spread(places, found))[real])
        assert torch.equal(held.slots.view(rows, wanted), slots)
        assert torch.equal(held.places.view(rows, wanted).sort(-1).values, torch.arange(wanted).expand(rows, -1).int())
        moved = (held.keys != fresh[1]).any(-1) | (held.values != fresh[2]).any(-1)
        fetched.append(int(moved.sum()))
        known = (slots[:, :, None] == fresh[0][:, None]).any(-1) & (slots < length - 1)
        if not (fresh[0].diff(dim=-1) < 0).any():  # disorder only costs fetches
            assert fetched[-1] == int((real & ~known).sum())
    assert fetched[0] == rows * wanted
    assert 0 < fetched[1] < rows * wanted
    assert fetched[6] == rows  # the rewritten token alone


def slots_of(rows: int, wanted: int, limit: int, seed: int) -> Tensor:
    """Ascending slots below a limit, int32 [rows, wanted]."""
    drawn = torch.stack([torch.randperm(limit, generator=generator(10 * seed + row))[:wanted] for row in range(rows)])
    return drawn.sort(-1).values.to(torch.int32)


def spread(slots: Tensor, states: Tensor) -> Tensor:
    return slots.clamp(min=0).long()[..., None].expand(-1, -1, states.shape[-1])


def test_the_kernels_are_refused_where_they_cannot_run() -> None:
    q, k = integers(1, 2, 1, 16, seed=1), integers(1, 1, 8, 16, seed=2)
    with raises_sentence(ValueError, match=r"CUDA .* backend='auto'"):
        fasa_attention(q, k, k, pick_chunks(1, 2), n_fac=4, backend="triton")


def test_more_elements_than_offsets_can_tell_apart_are_refused() -> None:
    scorer, query = DominantChunks(pick_chunks(1, 2).flatten(1)), mock.Mock(is_cuda=True, shape=(1, 2, 1, 16))
    packed = PackedKeys(torch.empty(1, 1, 2**29, 4, 1, device="meta"))
    call = Call(query, mock.Mock(), mock.Mock(), scorer, mock.Mock(), Budget(4), "max", mock.Mock(), packed)
    reason = dispatch.why_no_kernels(call)
    assert reason == "a head's packed keys must have fewer than 2147483648 elements, got 2147483648"


@pytest.mark.parametrize(("room", "refused"), [(20, True), (48, False)])
def test_packed_keys_need_room_for_a_multiple_of_16(room: int, refused: bool) -> None:
    """Of a head, or of a block of a paged cache; the kernels read up to 15 slots behind the last key."""
    scorer = DominantChunks(pick_chunks(1, 2).flatten(1))
    query = mock.Mock(is_cuda=True, shape=(1, 2, 1, 16), requires_grad=False)
    packed, rows = PackedKeys(torch.empty(1, 1, room, 4, 1, device="meta")), torch.empty(1, 1, room, 16)
    call = Call(query, rows, rows, scorer, mock.Mock(), Budget(4), "max", mock.Mock(), packed)
    reason = "a head or a block must have room for a multiple of 16 packed keys, got 20" if refused else None
    assert dispatch.why_no_kernels(call) == reason


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """In a process without the interpreter, which is more lenient than the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_compiled_model_decodes_by_kernels_without_copying_its_cache(
    llama: PreTrainedModel, ids: Ids, placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernels interpreted: gather's logits, and no buffer as long as the cache."""
    monkeypatch.setattr("fasa_flex.core.packed_keys.tile_of", lambda device: 1)
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(why_not=lambda call: None))
    monkeypatch.setitem(ORDER, ("auto", False), ORDER["auto", True])
    profile, length = profile_of(llama), 777
    prompt, tokens = ids(70, rows=2), [ids(1, seed=step, rows=2) for step in range(3)]

    def decode(backend: Any, run: Any) -> Tensor:
        config = FasaConfig(n_fac=8, n_tip=3, dense_layers=(0,), backend=backend)
        cache = FasaCache(llama, profile, config, placement=placement, max_cache_len=length)
        with torch.no_grad(), enable(llama, profile, config):
            llama(prompt, past_key_values=cache)
            return torch.cat([run(token, past_key_values=cache).logits for token in tokens])

    logits, code = run_and_get_code(decode, "auto", torch.compile(llama, fullgraph=True, dynamic=False))
    torch.testing.assert_close(logits, decode("gather", llama), atol=1e-4, rtol=1e-4)
    graph = max(code, key=len)
    called = [name for name in FUNCTIONS if graph.count(f"= torch.ops.fasa_flex.{name}.default(") == 2]
    assert called == (["sparse_decode"] if placement == "device" else ["select_slots", "hold_slots", "attend_slots"])
    assert graph.count("torch.ops.fasa_flex.cover_blocks.default(") == 2
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", graph)
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    assert sizes
    assert max(sizes) <= 2 * (length + 15)  # marks of each row, and nothing for each of its heads
