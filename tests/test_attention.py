"""fasa_attention: every backend against the oracle over a matrix of shapes, paddings, budgets and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import DIM, EXACT, Case, generator, integers, pick_chunks
from torch import Tensor
from torch.nn import functional as F

from fasa_flex import fasa_attention
from fasa_flex.backends import specialization
from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.budget import Budget
from fasa_flex.core.method import Call, Focus, attend
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax

CASES = [
    Case("plain"),
    Case("group of 1", heads=2),
    Case("group of 3", heads=6),
    Case("multi-query attention", heads=4, kv_heads=1),
    Case("batch", batch=3),
    Case("several queries", queries=5),
    Case("prefill", queries=24),
    Case("one token", length=1),
    Case("budget of one", n_fac=1),
    Case("budget one below the keys", n_fac=23),
    Case("budget of the keys", n_fac=24),
    Case("budget above the keys", n_fac=1000),
    Case("one chunk", n_tip=1),
    Case("all chunks", n_tip=8),
    Case("quarter share", n_fac=0.25, queries=7),
    Case("whole share", n_fac=1.0, queries=3),
    Case("tiny share is one token", n_fac=1e-4, queries=3),
    Case("left padding", batch=3, left=(0, 5, 23)),
    Case("left padding, several queries", batch=3, queries=6, left=(0, 5, 21)),
    Case("right padding", batch=3, right=(0, 7, 20), queries=4),
    Case("padding on both sides", batch=2, left=(3, 0), right=(2, 9), queries=24),
    Case("padding and share", batch=3, left=(0, 5, 20), n_fac=0.3, queries=2),
    Case("no valid key", batch=2, left=(24, 2)),
    Case("sinks", options={"n_sink": 3}),
    Case("recent", options={"n_recent": 3}, queries=4),
    Case("sinks and recent", options={"n_sink": 2, "n_recent": 2}, queries=4),
    Case("sinks and recent only", options={"n_sink": 2, "n_recent": 4}, queries=4),
    Case("sinks and recent with padding", batch=3, left=(0, 4, 17), options={"n_sink": 2, "n_recent": 1}, queries=3),
    Case("sinks and recent, right padding", batch=2, right=(0, 6), options={"n_sink": 1, "n_recent": 2}, queries=3),
    Case("mean", queries=3, options={"group_reduce": "mean"}),
    Case("no reduction", queries=3, options={"group_reduce": "none"}),
    Case("no reduction, padding", batch=2, left=(0, 9), options={"group_reduce": "none", "n_recent": 1}),
    Case("chunks per query head", per_query_head=True, queries=3),
    Case("chunks per query head, share", per_query_head=True, n_fac=0.2, batch=2, options={"n_sink": 1}),
    Case("scaling", options={"scaling": 0.7}),
]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, backend: str) -> None:
    q, k, v, chunks = case.tensors(dtype=torch.float64)
    out = case.run(q, k, v, chunks, backend)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out.numpy(), case.oracle(q, k, v, chunks).out, atol=1e-12)


FLEX_CASES = [
    Case("decode, sinks, recent, padding", batch=2, left=(0, 9), options={"n_sink": 1, "n_recent": 2}),
    Case("several queries, share, group of 3", heads=6, queries=3, n_fac=0.3),
    Case("per query head, no valid key", batch=2, per_query_head=True, left=(24, 2)),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_flex_equals_the_oracle_through_changing_shapes() -> None:
    """One process serves other batches, heads and numbers of queries, as generation and evaluation do in turn."""
    for case in FLEX_CASES:
        q, k, v, chunks = case.tensors()
        expected = case.oracle(q, k, v, chunks).out
        np.testing.assert_allclose(case.run(q, k, v, chunks, "flex").numpy(), expected, atol=1e-5, err_msg=case.name)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype_and_selection(backend: str, dtype: torch.dtype) -> None:
    """Whole numbers up to 2 are exact in every dtype, and so must be the ranking."""
    case = Case("several", batch=2, queries=4, left=(0, 5))
    q, k, v, chunks = case.tensors(dtype=dtype)
    out = case.run(q, k, v, chunks, backend)
    assert out.dtype == dtype
    atol = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    np.testing.assert_allclose(out.double().numpy(), case.oracle(q, k, v, chunks).out, atol=atol)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("how", ["max", "mean", "softmax", "softmax_exact", "none"])
@pytest.mark.parametrize("left", [(), (0, 6)], ids=["no padding", "left padding"])
def test_group_reductions_on_continuous_scores(backend: str, how: str, left: tuple[int, ...]) -> None:
    case = Case("continuous", batch=2, queries=3, left=left, options={"group_reduce": how})
    chunks = case.tensors()[3]
    q = torch.randn(2, 4, 3, DIM, generator=generator(7), dtype=torch.float64)
    k = torch.randn(2, 2, 24, DIM, generator=generator(8), dtype=torch.float64)
    v = torch.randn(2, 2, 24, DIM, generator=generator(9), dtype=torch.float64)
    expected = case.oracle(q, k, v, chunks)
    assert expected.margin > 1e-4, "float32 might rank these inputs differently: choose another seed"
    np.testing.assert_allclose(case.run(q, k, v, chunks, backend).numpy(), expected.out, atol=1e-12)


def test_group_reductions_select_differently() -> None:
    """Otherwise the test above could not tell them apart."""
    outs = {}
    for how in ("max", "mean", "softmax", "none"):
        case = Case(how, queries=8, options={"group_reduce": how})
        outs[how] = case.run(*case.tensors(), "gather")
    names = list(outs)
    assert all(not torch.allclose(outs[a], outs[b]) for i, a in enumerate(names) for b in names[i + 1 :])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("n_fac", [24, 25, 10_000, 1.0])
@pytest.mark.parametrize("queries", [1, 6, 24])
def test_a_budget_of_all_keys_is_dense_attention(backend: str, n_fac: float, queries: int) -> None:
    case = Case("full", batch=2, queries=queries, n_fac=n_fac)
    q, k, v, chunks = case.tensors()
    causal = torch.ones(queries, 24, dtype=torch.bool).tril(24 - queries)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(case.run(q, k, v, chunks, backend), dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
def test_the_defaults_are_256_tokens_4_and_32_of_them_forced_ranked_by_sampled_weights(backend: str) -> None:
    shapes, draw = ((4, 1), (2, 299), (2, 299)), generator(7)
    q, k, v = (torch.randn(1, heads, n, DIM, generator=draw, dtype=torch.float64) for heads, n in shapes)
    chunks = pick_chunks(2, 3)
    out = fasa_attention(q, k, v, chunks, backend=backend)
    written_out = {"n_fac": 256, "n_sink": 4, "n_recent": 32, "group_reduce": "softmax"}
    expected = oracle.fasa(*(x.numpy() for x in (q, k, v, chunks)), **written_out)
    assert expected.margin > 1e-4
    np.testing.assert_allclose(out.numpy(), expected.out, atol=1e-12)
    for change in ({"n_fac": 255}, {"n_sink": 3}, {"n_recent": 31}, {"group_reduce": "max"}):
        assert not out.equal(fasa_attention(q, k, v, chunks, backend=backend, **{**written_out, **change})), change


@pytest.mark.parametrize(
    ("keys", "values", "packed", "compiled"),
    [(32, 32, 32, 32), (32, 32, 64, 32), (64, 64, 32, 11), (32, 48, 64, 11), (48, 32, 64, 11), (11, 11, 32, 11)],
    ids=["room", "more packed", "fewer packed", "more values", "more keys", "full"],
)
@pytest.mark.parametrize("backend", ["fastest", "auto", "gather"])
def test_what_compiles_is_a_growing_caches_whole_buffer(
    keys: int, values: int, packed: int, compiled: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one graph serves until it is full; free slots, which may hold anything, are not valid."""
    seen: list[list[int]] = []

    def compile_nothing(*signature: object) -> Callable[..., Tensor]:
        def step(call: Call, focus: Focus) -> Tensor:
            seen.append([call.key.shape[2], call.value.shape[2], call.valid.shape[-1]])
            return attend(call, focus)

        return step

    monkeypatch.setattr(specialization, "_compiled", compile_nothing)
    scorer = DominantChunks(torch.tensor([[0, 1], [2, 3]]))
    q = integers(1, 4, 1, 8, seed=1)
    k, v = (integers(1, 2, room, 8, seed=room)[:, :, :11] for room in (keys, values))
    held = PackedKeys.of(scorer.pack(k), None, packed)
    call = (q, k, v, scorer, valid_keys(1, 11, None, q.device), Budget(4), "softmax", Softmax(0.3))
    out = sparse_attention(Call(*call, held), backend)
    assert torch.equal(out, sparse_attention(Call(*call), "gather"))
    assert seen == ([[compiled] * 3] if backend == "fastest" else [])


@pytest.mark.parametrize("magnitude", [1.0, 100.0, 400.0])
def test_the_reference_takes_half_precision_as_far_as_the_fast_paths(magnitude: float) -> None:
    """A dot product of float16 numbers may exceed 65504 where its product with the scale does not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 64, generator=generator) for heads, n in ((4, 1), (2, 40), (2, 40)))
    q, k, v = (q * magnitude).half(), (k * magnitude).half(), v.half()
    chunks = torch.arange(64).view(1, 32, 2).expand(2, -1, -1)
    outs = [fasa_attention(q, k, v, chunks, n_fac=8, backend=backend) for backend in ("reference", "gather")]
    assert outs[0].dtype == torch.float16
    assert outs[0].isfinite().all()
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)
