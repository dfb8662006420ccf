"""Completion: the oracle's numbers by every backend, what it is for Gaussian states, and what it must not depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import DIM, EXACT, generator, pick_chunks
from completed import attend, state_of
from sentences import raises_sentence
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fasa_flex import fasa_attention
from fasa_flex.backends import specialization
from fasa_flex.backends.gather import gather_focused
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion, CompletionState, complete, kept_share
from fasa_flex.core.group_reduce import Weights, weigh
from fasa_flex.core.selection import Marks, select, valid_keys
from fasa_flex.core.softmax import Softmax

LENGTH = 150
SINKS = torch.linspace(-2, 3, 4, dtype=torch.float64)


def weights_of(logits: torch.Tensor, valid: torch.Tensor) -> Weights:
    """Weights of all keys, relative to those sampled."""
    sample = Marks.of(valid, Budget(1), samples=True).sample
    assert sample is not None
    return weigh(logits, valid, sample)


def tensors(
    queries: int = 1, length: int = LENGTH, batch: int = 2, dtype: torch.dtype = torch.float64, value_dim: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and chunks of two key/value heads; keys and values are correlated and far from zero."""
    draw = generator(queries + length)
    q = torch.randn(batch, 4, queries, DIM, generator=draw, dtype=torch.float64)
    k = torch.randn(batch, 2, length, DIM, generator=draw, dtype=torch.float64)
    v = k[..., :value_dim] + torch.randn(batch, 2, length, value_dim, generator=draw, dtype=torch.float64)
    return q.to(dtype), (k + 1).to(dtype), (v + 2).to(dtype), pick_chunks(2, 4)


def padding(left: tuple[int, int], right: tuple[int, int] = (0, 0), length: int = LENGTH) -> Tensor:
    slots = torch.arange(length)
    return (slots >= torch.tensor(left)[:, None]) & (slots < length - torch.tensor(right)[:, None])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The flex backend without its compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    specialization._compiled.cache_clear()
    yield
    specialization._compiled.cache_clear()


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean value": {"strength": 0.0},
    "whole": {"strength": 1.0},
    "none reduced": {"group_reduce": "none"},
    "share, forced tokens": {"n_fac": 0.2, "forced": (None, None)},
    "learned sinks": {"sinks": SINKS},
    "soft cap": {"softcap": 1.5},
    "soft cap, sinks, mean key": {"softcap": 1.5, "sinks": SINKS, "mean_key": torch.arange(2.0 * DIM).view(2, -1) / 10},
    "mean key": {"mean_key": torch.ones(2, DIM)},
}


def both(case: dict[str, Any], calls: tuple[Tensor, ...], key_mask: Tensor | None, **how: Any) -> tuple[Tensor, Any]:
    """What the library and the oracle make of a call."""
    options = {"strength": 0.75, "group_reduce": "max", "n_fac": 16, "forced": (0, 0), **case}
    cap, sinks, mean = (options.pop(name, None) for name in ("softcap", "sinks", "mean_key"))
    scaling = 0.4
    out = attend(*calls, key_mask=key_mask, softmax=Softmax(scaling, cap, sinks), mean_key=mean, **options, **how)
    (n_sink, n_recent), mask = options.pop("forced"), None if key_mask is None else key_mask.numpy()
    found = oracle.fasa(
        *(x.double().numpy() for x in calls[:3]),
        calls[3].numpy(),
        scaling=scaling,
        softcap=cap,
        sinks=None if sinks is None else sinks.numpy(),
        mean_key=None if mean is None else mean.double().numpy(),
        key_mask=mask,
        n_sink=n_sink,
        n_recent=n_recent,
        **options,
    )
    assert found.margin > 1e-6
    return out, found.out


@pytest.mark.parametrize("masked", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("case", WAYS, ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_many_queries_equal_the_oracle(case: str, backend: str, masked: bool) -> None:
    """The last of them see 128 keys and more, the first see fewer and cover one block."""
    mask = padding((0, 5), (10, 0)) if masked else None
    out, expected = both(WAYS[case], tensors(queries=LENGTH - 125), mask, backend=backend)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("case", WAYS, ids=str)
@pytest.mark.parametrize("backend", [*EXACT, "flex"])
def test_a_decode_step_equals_the_oracle(case: str, backend: str, uncompiled: None) -> None:
    """By the state of a cache, written in pieces; row 1 is padded by more than a block."""
    if backend == "flex" and "sinks" in WAYS[case]:
        pytest.skip("flex has no learned sinks on CPU")
    q, k, v, chunks = tensors()
    mask = padding((0, 70))
    state = state_of(k, v, mask, WAYS[case].get("strength") != 0.0, steps=(30, 70, 1, 48, 1))
    out, expected = both(WAYS[case], (q, k, v, chunks), mask, backend=backend, state=state)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("strength", [0.75, 0.0])
def test_the_whole_method_completes_where_it_is_given_a_state(strength: float) -> None:
    """`fasa_attention` with its defaults but for the budget, and with a profile's mean key."""
    q, k, v, chunks = tensors()
    mean = k.mean((0, 2)).float()
    given = {"n_fac": 32, "mean_key": mean, "completion_strength": strength}
    out = fasa_attention(q, k, v, chunks, **given, state=state_of(k, v), backend="gather")
    written_out = {"n_fac": 32, "n_sink": None, "n_recent": None, "group_reduce": "softmax", "strength": strength}
    found = oracle.fasa(*(x.numpy() for x in (q, k, v, chunks)), mean_key=mean.double().numpy(), **written_out)
    assert found.margin > 1e-5
    np.testing.assert_allclose(out.numpy(), found.out, atol=2e-5)
    without = fasa_attention(q, k, v, chunks, n_fac=32, mean_key=mean, backend="gather")
    found = oracle.fasa(*(x.numpy() for x in (q, k, v, chunks)), **{**written_out, "strength": None})
    np.testing.assert_allclose(without.numpy(), found.out, atol=1e-6)


def test_fewer_than_64_valid_keys_are_not_completed() -> None:
    """Valid ones, not slots: of 100, 63 and 64 are valid. The 64th key completes."""
    q, k, v, chunks = tensors(length=100)
    mask = padding((37, 36), length=100)
    state = state_of(k, v, mask)
    assert state.covered.tolist() == [[0, 0], [64, 64]]
    for given in (state, None):
        completed = attend(q, k, v, chunks, key_mask=mask, state=given)
        plain = fasa_attention(
            q, k, v, chunks, n_fac=16, n_sink=0, n_recent=0, group_reduce="max", key_mask=mask, backend="gather"
        )
        torch.testing.assert_close(completed[0], plain[0], atol=1e-6, rtol=0)
        assert (completed[1] - plain[1]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("n_fac", [LENGTH, 1000, 1.0])
def test_a_budget_of_all_keys_is_dense_attention(backend: str, n_fac: float) -> None:
    q, k, v, chunks = tensors(queries=3)
    causal = torch.ones(3, LENGTH, dtype=torch.bool).tril(LENGTH - 3)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, chunks, n_fac=n_fac, backend=backend), dense, atol=1e-5, rtol=0)
    last = attend(q[:, :, -1:], k, v, chunks, n_fac=n_fac, backend=backend, state=state_of(k, v))
    torch.testing.assert_close(last, dense[:, :, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_it_is_dense_attention_of_gaussian_states(deviation: float) -> None:
    """Within five standard errors: S is drawn without regard to the scores, which are exact, and lambda is 1.

    What is completed is the weighted mean value of the keys outside of S, an average of as many keys as their weights
    make independent, n / exp(deviation ** 2). The state's own mean and covariance are averages of all keys.
    """
    draw, length, dim, scaling = generator(3), 64 * 256, 8, 0.3
    k = torch.randn(1, 1, length, dim, generator=draw, dtype=torch.float64)
    mixed = torch.randn(dim, 5, generator=draw, dtype=torch.float64)
    v = k @ mixed + torch.randn(1, 1, length, 5, generator=draw, dtype=torch.float64)
    q = torch.randn(1, 16, 1, dim, generator=draw, dtype=torch.float64)
    q = q / q.norm(dim=-1, keepdim=True) * deviation / scaling
    valid, softmax = valid_keys(1, length, None, q.device), Softmax(scaling)
    selection = select(torch.rand(1, 1, 1, 1, length, generator=draw), valid, Budget(64))
    out, _ = gather_focused(q, k, v, selection, softmax)
    scores = (q @ k.mT)[:, None, :, 0, None]
    logits = softmax.logits(scores).transpose(2, 3)[:, :, 0][:, :, :, None]
    share = kept_share(logits, weights_of(logits, valid), selection)
    dense = F.scaled_dot_product_attention(q, k.expand(-1, 16, -1, -1), v.expand(-1, 16, -1, -1), scale=scaling)
    remainder, known = Completion(1.0, state_of(k, v)).remainder(q, k, v, valid, scaling)
    assert bool(known.all())
    spread = float((v - v.mean(2, keepdim=True)).pow(2).mean(2).sqrt().max())
    allowed = 5 * spread * (math.exp(deviation**2 / 2) + 1 + deviation) / math.sqrt(length)
    completed = complete(out, share, remainder)
    assert (completed - dense).abs().max() < allowed
    assert (out - dense).abs().max() > allowed  # the selection alone, of fewer keys
    mean_alone, _ = Completion(0.0, state_of(k, v)).remainder(q, k, v, valid, scaling)
    assert (complete(out, share, mean_alone) - dense).abs().max() > allowed


def selected(q: Tensor, k: Tensor, chunks: Tensor) -> Tensor:
    """Keys of one row that any head selects, bool [B, T]: values are one-hot, and weights without completion."""
    ones = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return (
        fasa_attention(q, k, ones, chunks, n_fac=16, n_sink=0, n_recent=0, group_reduce="max", backend="gather").sum(
            (1, 2)
        )
        > 0
    )


@pytest.mark.parametrize("with_state", [True, False])
def test_the_order_of_covered_unselected_tokens_does_not_matter(with_state: bool) -> None:
    """Nor the values of unselected tokens behind the covered ones; those of covered ones do."""
    q, k, v, chunks = tensors(batch=1)
    left = ~selected(q, k, chunks)[0]
    covered = (torch.arange(LENGTH) >= 4) & (torch.arange(LENGTH) < 128)
    free = (left & covered).nonzero().flatten()
    turned = free[torch.randperm(len(free), generator=generator(1))]

    def run(k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, chunks, state=state_of(k, v) if with_state else None)

    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, free], other_v[:, :, free] = k[:, :, turned], v[:, :, turned]
    torch.testing.assert_close(run(other_k, other_v), run(k, v), atol=1e-5, rtol=0)
    behind = torch.where((left & ~covered)[:, None], 1e3, v)
    torch.testing.assert_close(run(k, behind), run(k, v), atol=1e-6, rtol=0)
    parted = v.clone()  # values that no longer go with their keys
    parted[:, :, free] = v[:, :, turned]
    assert (run(k, parted) - run(k, v)).abs().max() > 1e-3


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("sides", [((40, 0), (0, 0)), ((0, 0), (40, 3)), ((7, 40), (33, 0))], ids=str)
def test_padding_never_enters_and_a_batch_is_its_rows_alone(
    sides: tuple[tuple[int, int], tuple[int, int]], with_state: bool
) -> None:
    """Padding holds what would spoil every sum."""
    q, k, v, chunks = tensors()
    mask = padding(*sides)
    loud_k, loud_v = (torch.where(mask[:, None, :, None], x, spoils) for x, spoils in ((k, torch.inf), (v, torch.nan)))
    state = state_of(loud_k, loud_v, mask) if with_state else None
    out = attend(q, loud_k, loud_v, chunks, key_mask=mask, state=state)
    for row in range(2):
        real = mask[row]
        alone = (q[row : row + 1], k[row : row + 1, :, real], v[row : row + 1, :, real], chunks)
        expected = attend(*alone, state=state_of(*alone[1:3]) if with_state else None)
        torch.testing.assert_close(out[row], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [(150,), (1,) * 150, (64, 64, 22), (63, 1, 1, 85), (10, 139, 1)], ids=str)
def test_a_state_does_not_depend_on_how_it_was_written(steps: tuple[int, ...]) -> None:
    _, k, v, _ = tensors(dtype=torch.float32)
    mask = padding((0, 21))
    state = state_of(k, v, mask, steps=steps)
    assert state.covered.tolist() == [[128, 128], [128, 128]]
    for row, first in enumerate((4, 25)):  # sinks are left out
        keys, values = (x[row, :, first : first + 124].double() for x in (k, v))
        torch.testing.assert_close(state.mean_value[row].double(), values.mean(1), atol=1e-5, rtol=0)
        centred = keys - keys.mean(1, keepdim=True)
        covariance = centred.mT @ (values - values.mean(1, keepdim=True)) / 124
        torch.testing.assert_close(state.covariance[row].double(), covariance, atol=1e-4, rtol=0)


def test_a_state_of_cropped_keys_is_made_anew() -> None:
    """Below its end, above it, below the first block, and by row."""
    _, k, v, _ = tensors(length=200, dtype=torch.float32)
    other = k + 3
    for kept, tokens in ((190, 3), (130, 3), (100, 50), (40, 20), (0, 90)):
        state = state_of(k, v)
        keys = torch.cat([k[:, :, :kept], other[:, :, kept : kept + tokens]], 2)
        values = torch.cat([v[:, :, :kept], -v[:, :, kept : kept + tokens]], 2)
        valid = torch.ones(1, kept + tokens, dtype=torch.bool)
        state.advance(keys, values, valid, valid.cumsum(-1), tokens)
        fresh = state_of(keys, values)
        assert state.covered.equal(fresh.covered)
        if int(fresh.covered[0, 0]):
            for name in ("mean_value", "covariance"):
                torch.testing.assert_close(getattr(state, name), getattr(fresh, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first_order", [True, False])
def test_a_state_holds_what_its_completion_reads(first_order: bool) -> None:
    _, k, v, _ = tensors(dtype=torch.bfloat16)
    state = state_of(k, v, first_order=first_order)
    dim = DIM if first_order else 0
    assert [tuple(held.shape[2:]) for held in state.tensors] == [(), (dim,), (6,), (dim, 6), (6,), (dim, 6)]
    assert state.mean_value.dtype == state.covariance.dtype == torch.bfloat16
    assert state.product.dtype == state.key_sum.dtype == state.value_sum.dtype == torch.float32
    assert state.n_bytes == 2 * 2 * (8 + 4 * (dim + 6 + dim * 6) + 2 * (6 + dim * 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("with_state", [True, False])
def test_half_precision_stays_finite_and_near(dtype: torch.dtype, size: float, with_state: bool) -> None:
    """Queries and keys of 60 have products that float16 does not hold, and so has a query times a covariance."""
    draw = generator(9)
    q, k = size * torch.randn(1, 4, 1, 64, generator=draw), size * torch.randn(1, 2, 200, 64, generator=draw)
    q, k = q.to(dtype), k.to(dtype)
    v = (size / 2 * (k[..., :32] / size + torch.randn(1, 2, 200, 32, generator=draw))).to(dtype)
    calls = (q, k, v, torch.arange(64).view(1, 32, 2).expand(2, -1, -1))
    softmax = Softmax(1 / (8 * size * size))
    out = attend(*calls, softmax=softmax, state=state_of(k, v) if with_state else None)
    assert out.dtype == dtype
    assert out.isfinite().all()
    exact = attend(*(x.double() if x.is_floating_point() else x for x in calls), softmax=softmax, backend="reference")
    near = size * (0.03 if dtype == torch.bfloat16 else 4e-3)
    torch.testing.assert_close(out.double(), exact, atol=near, rtol=0)


@pytest.mark.parametrize("with_state", [True, False])
def test_autocast_rounds_no_state(with_state: bool) -> None:
    """A covariance is a small difference of large sums; queries and keys are handed over in single precision here."""
    q, k, v, chunks = tensors(dtype=torch.float32)
    k, v = k + 20, v + 20
    expected = attend(q, k, v, chunks, state=state_of(k, v) if with_state else None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, chunks, state=state_of(k, v) if with_state else None)
    torch.testing.assert_close(out.float(), expected, atol=0.2, rtol=0)  # of values of 20, rounded by attention itself


@pytest.mark.parametrize("scaled", [1e2, 1e6])
def test_estimates_far_apart_share_without_overflow(scaled: float) -> None:
    """Either S has all of the mass, or the remainder has."""
    logits = scaled * torch.rand(1, 1, 2, 1, 90, generator=generator(2))
    logits[0, 0, 0, 0, 3] = 2 * scaled
    logits[0, 0, 1, 0, 80] = 2 * scaled
    valid = valid_keys(1, 90, None, logits.device)
    selection = select(-torch.arange(90.0).view(1, 1, 1, 1, -1), valid, Budget(10))
    assert kept_share(logits, weights_of(logits, valid), selection).flatten().tolist() == [1.0, 0.0]
    none = valid & False
    nothing = kept_share(logits, weights_of(logits, none), select(logits, none, Budget(10)))
    assert nothing.flatten().tolist() == [1.0, 1.0]


def test_gradients_are_those_of_the_reference() -> None:
    """Without a state, as where many queries are sparse at once."""
    *states, chunks = tensors(3, 70, 1, torch.float32)
    grads = []
    for backend in EXACT:
        leaves = [x.clone().requires_grad_() for x in states]
        attend(*leaves, chunks, backend=backend).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": tensors(queries=2)[0]}, "state completes one query a row, got 2"),
        ({"state": state_of(*tensors(batch=1)[1:3])}, r"state is of values \(1, 2, 6\) .* expected \(2, 2, 6\)"),
        ({"state": state_of(*(x[..., :4] for x in tensors()[1:3]))}, r"keys of 4 dimensions, expected .* and 16"),
        ({"mean_key": torch.zeros(2, 3)}, r"mean_key must be \(2, 16\)"),
        ({"mean_key": torch.zeros(2, DIM), "chunks": pick_chunks(4, 2)}, "one chunk set per key/value head"),
    ],
    ids=["queries", "batch", "dimensions", "mean key", "sets per query head"],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict[str, Any], named: str) -> None:
    q, k, v, chunks = tensors()
    call = {"q": q, "k": k, "v": v, "chunks": chunks, "state": state_of(k, v), "backend": "gather"}
    fasa_attention(**call)
    with raises_sentence(ValueError, match=named):
        fasa_attention(**{**call, **change})


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("backend", "compiler"), [("gather", "aot_eager"), ("flex", "eager")])
@torch.no_grad()
def test_traced_it_is_the_eager_result(backend: str, compiler: str) -> None:
    """One graph for a growing cache, which brings the state up to date, and two compilations."""
    counter = CompileCounterWithBackend(compiler)

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, held: list[Tensor]) -> Tensor:
        state, valid = CompletionState(*held), torch.ones(1, k.shape[2], dtype=torch.bool)
        state.advance(k, v, valid, valid.cumsum(-1), 1)
        return fasa_attention(q, k, v, chunks, n_fac=16, state=state, backend=backend)

    q, k, v, chunks = tensors(dtype=torch.float32, value_dim=DIM)
    state = state_of(k[:, :, :126], v[:, :, :126])
    for length in (127, 128, 129):
        keys, values = k[:, :, :length], v[:, :, :length]
        out = step(q, keys, values, chunks, list(state.tensors))
        assert state.covered.eq(length // 64 * 64).all()
        given = {"n_fac": 16, "state": state_of(keys, values), "backend": "reference"}
        torch.testing.assert_close(out, fasa_attention(q, keys, values, chunks, **given), atol=2e-5, rtol=0)
    assert counter.frame_count <= 2
