"""fasa_attention on arbitrary shapes, dtypes, budgets, paddings and forced tokens: what it equals, what it ignores."""

from __future__ import annotations

import math

import numpy as np
import oracle
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties.calls import EXACT, Call, calls, cases, layouts, whole
from torch import Tensor
from torch.nn import functional as F

from fasa_flex import fasa_attention


@cases(1.5)
@given(calls())
def test_gather_and_reference_equal_the_oracle(call: Call) -> None:
    expected = call.oracle().out
    for backend in EXACT:
        call.check(call.run(backend), expected, backend)


@cases(1)
@given(calls(dtypes=(torch.float64, torch.float32), reduces=("softmax", "softmax_exact")), st.integers(0, 2**20))
def test_a_group_ranks_by_its_mean_weight(call: Call, seed: int) -> None:
    """Continuous scores: near-ties, which float32 and float64 may rank differently, are left out."""
    generator = torch.Generator().manual_seed(seed)
    call = call.but(
        q=torch.randn(call.q.shape, generator=generator).to(call.q),
        k=torch.randn(call.k.shape, generator=generator).to(call.k),
    )
    assume(call.options["scaling"] != 0)
    expected = call.oracle()
    assume(expected.margin > 1e-4)
    for backend in EXACT:
        call.check(call.run(backend), expected.out, backend)


def selected(call: Call, backend: str) -> Tensor:
    """The keys with weight, bool [B, Hq, Q, T]: values are one-hot, and a scaling of 0 makes all weights equal."""
    batch, kv_heads, length = call.k.shape[:3]
    v = torch.eye(length, dtype=call.q.dtype).expand(batch, kv_heads, -1, -1)
    return call.but(v=v).run(backend, scaling=0.0, softcap=None, sinks=None) > 0


@cases(1.5)
@given(calls())
def test_what_is_selected(call: Call) -> None:
    """Within the valid keys, as many as the budget says, the forced ones among them; the oracle's sets, exactly."""
    n_fac, n_sink, n_recent = (call.options[name] for name in ("n_fac", "n_sink", "n_recent"))
    taken = {backend: selected(call, backend) for backend in EXACT}
    queries, length = call.q.shape[2], call.k.shape[2]
    for (b, h, i), expected in call.oracle().selected.items():
        valid = oracle.valid_keys(length - queries + i, None if call.key_mask is None else call.key_mask[b].tolist())
        for backend in EXACT:
            slots = taken[backend][b, h, i].nonzero().flatten().tolist()
            assert set(slots) <= set(valid)
            assert len(slots) == oracle.budget(n_fac, len(valid))
            forced = {*valid[:n_sink], *valid[max(0, len(valid) - n_recent) :]}
            assert forced <= set(slots) or len(forced) > len(slots)
            assert slots == expected


@cases(1)
@given(calls(), st.data())
def test_rows_queries_and_heads_are_independent(call: Call, data: st.DataObject) -> None:
    """Any one row, head group and query alone gives its slice of the whole."""
    batch, heads, queries, _ = call.q.shape
    kv_heads, length = call.k.shape[1:3]
    b, n, i = (data.draw(st.integers(0, size - 1)) for size in (batch, kv_heads, queries))
    members, end = slice(n * call.group, (n + 1) * call.group), length - queries + i + 1
    sinks = call.options.get("sinks")
    alone = call.but(
        q=call.q[b : b + 1, members, i : i + 1],
        k=call.k[b : b + 1, n : n + 1, :end],
        v=call.v[b : b + 1, n : n + 1, :end],
        chunks=call.chunks[members] if len(call.chunks) == heads else call.chunks[n : n + 1],
        key_mask=None if call.key_mask is None else call.key_mask[b : b + 1, :end],
        sinks=None if sinks is None else sinks[members],
    )
    if call.per_query_head and call.group == 1:
        alone = alone.but(group_reduce="none")
    call.check(alone.run("gather")[0, :, 0], call.run("gather")[b, members, i].double().numpy())


@cases(1)
@given(calls(), st.sampled_from([1e4, math.inf, math.nan]), st.sampled_from([60.0, math.inf, -math.inf]))
def test_what_was_not_selected_does_not_matter(call: Call, value: float, key: float) -> None:
    """Values outside every head's selection may be anything, and so may masked keys."""
    used = torch.zeros(call.k.shape[:3], dtype=torch.bool)
    for (b, h, _), slots in call.oracle().selected.items():
        used[b, h // call.group, slots] = True
    other = call.but(v=torch.where(used[..., None], call.v, value))
    if call.key_mask is not None:
        other = other.but(k=torch.where(call.key_mask[:, None, :, None], call.k, key))
    for backend in EXACT:
        assert torch.equal(other.run(backend), call.run(backend)), backend


@cases(1)
@given(calls(), st.integers(0, 9), st.integers(0, 5))
def test_padding_on_either_side_changes_nothing(call: Call, left: int, right: int) -> None:
    """Padding holds keys that would win every ranking and values that would show."""
    batch, _, queries, _ = call.q.shape
    mask = torch.ones(batch, call.k.shape[2], dtype=torch.bool) if call.key_mask is None else call.key_mask
    padded = call.but(
        q=F.pad(call.q, (0, 0, 0, right), value=50.0),
        k=F.pad(call.k, (0, 0, left, right), value=50.0),
        v=F.pad(call.v, (0, 0, left, right), value=50.0),
        key_mask=F.pad(mask, (left, right), value=False),
    )
    for backend in EXACT:
        out = padded.run(backend)[:, :, :queries]
        call.check(out, call.run(backend).double().numpy(), backend)


@cases(1)
@given(calls(), st.randoms(use_true_random=False))
def test_permuting_heads_permutes_results(call: Call, random: object) -> None:
    """Groups move together, and turn inside."""
    kv_heads, group = call.k.shape[1], call.group
    kv_order = random.sample(range(kv_heads), kv_heads)
    order = [n * group + g for n in kv_order for g in random.sample(range(group), group)]
    sinks = call.options.get("sinks")
    moved = call.but(
        q=call.q[:, order],
        k=call.k[:, kv_order],
        v=call.v[:, kv_order],
        chunks=call.chunks[order if len(call.chunks) == len(order) else kv_order],
        sinks=None if sinks is None else sinks[order],
    )
    for backend in EXACT:
        call.check(moved.run(backend), call.run(backend)[:, order].double().numpy(), backend)


@cases(1)
@given(calls(reduces=("max", "mean"), plain=True), st.data())
def test_all_chunks_rank_as_the_full_score(call: Call, data: st.DataObject) -> None:
    """All chunks of any layout: the result of attending to the keys of highest q . k."""
    layout = data.draw(layouts(call.q.shape[-1]))
    call = call.but(chunks=layout.chunks.expand(call.q.shape[1], -1, -1), group_reduce="none", n_sink=0, n_recent=0)
    q, k, v = (x.double().numpy() for x in (call.q, call.k, call.v))
    scaling = call.options["scaling"]
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    expected = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        n = h // call.group
        mask = None if call.key_mask is None else call.key_mask[b].tolist()
        valid = oracle.valid_keys(k.shape[2] - q.shape[2] + i, mask)
        slots = oracle.top(k[b, n] @ q[b, h, i], valid, oracle.budget(call.options["n_fac"], len(valid)))
        expected[b, h, i] = oracle.attend(q[b, h, i], k[b, n], v[b, n], slots, scaling)
    for backend in EXACT:
        call.check(call.run(backend), expected, backend)


@cases(1)
@given(calls(reduces=("max", "mean", "softmax", "softmax_exact", "none")), st.sampled_from([0, 1, 1000, 1.0]))
def test_a_budget_of_all_keys_is_dense_attention(call: Call, extra: float) -> None:
    """Whatever the chunks, forced tokens and reduction."""
    n_fac = 1.0 if isinstance(extra, float) else max(call.k.shape[2], 6) + extra
    every = call.but(n_fac=n_fac)
    whole_set = every.but(chunks=call.chunks[: call.k.shape[1]], group_reduce="max").oracle()
    assert all(math.isinf(margin) for margin in [whole_set.margin])  # nothing was left out
    for backend in EXACT:
        call.check(every.run(backend), whole_set.out, backend)


@cases(0.5)
@given(calls(), st.integers(0, 2**20))
def test_packed_keys_and_the_order_of_chunks_change_nothing(call: Call, seed: int) -> None:
    """Packed keys hold the chunks' dimensions in their order; a set has no order."""
    assume(len(call.chunks) == call.k.shape[1])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(call.chunks.shape[1], generator=generator)
    turned = call.but(chunks=call.chunks[:, order].flip(-1))
    packed = torch.stack([call.k[:, n][..., dims.flatten()] for n, dims in enumerate(call.chunks)], 1)
    for backend in EXACT:
        before = call.run(backend)
        assert torch.equal(turned.run(backend), before)
        assert torch.equal(call.run(backend, packed_keys=packed), before)


@cases(0.5)
@given(calls(plain=True), st.integers(0, 2**20))
def test_scores_only_rank(call: Call, seed: int) -> None:
    """Packed keys that rank otherwise change the selection and no weight: attention is over the true keys."""
    assume(len(call.chunks) == call.k.shape[1])
    other = call.but(k=whole(torch.Generator().manual_seed(seed), 3, *call.k.shape).to(call.k))
    packed = torch.stack([other.k[:, n][..., dims.flatten()] for n, dims in enumerate(call.chunks)], 1)
    q, k, v = (x.double().numpy() for x in (call.q, call.k, call.v))
    scaling = call.options["scaling"]
    expected = np.zeros((*q.shape[:3], v.shape[-1]))
    for (b, h, i), slots in other.oracle().selected.items():
        n = h // call.group
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        expected[b, h, i] = oracle.attend(q[b, h, i], k[b, n], v[b, n], slots, scale)
    out = fasa_attention(
        call.q,
        call.k,
        call.v,
        call.chunks,
        key_mask=call.key_mask,
        backend="gather",
        packed_keys=packed,
        **call.options,
    )
    call.check(out, expected)
