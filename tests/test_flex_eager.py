"""The flex backend without the compiler, where `flex_attention` computes every score and masks it.

That the block list is right is seen in test_masks.py, that the compiled kernel agrees in test_compile.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import DIM, Case, integers, pick_chunks

from fasa_flex import fasa_attention
from fasa_flex.backends import specialization, table
from fasa_flex.core import method
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import with_sinks
from fasa_flex.core.method import flex_focused
from fasa_flex.core.selection import select, valid_keys
from fasa_flex.core.softmax import Softmax

CASES = [
    Case("decode"),
    Case("group of 1", heads=2),
    Case("group of 3", heads=6, n_fac=5),
    Case("multi-query attention", heads=4, kv_heads=1),
    Case("batch", batch=3),
    Case("several queries", queries=5),
    Case("prefill, two query blocks", heads=12, queries=24, batch=2),
    Case("one token", length=1),
    Case("left padding", batch=3, queries=6, left=(0, 5, 21)),
    Case("no valid key", batch=2, left=(24, 2)),
    Case("sinks and recent", options={"n_sink": 2, "n_recent": 2}, queries=4),
    Case("no reduction", queries=3, heads=6, options={"group_reduce": "none"}),
    Case("no reduction, decode", heads=6, options={"group_reduce": "none"}),
    Case("chunks per query head", per_query_head=True, queries=3),
    Case("share", n_fac=0.3, queries=3),
    Case("scaling", options={"scaling": 0.7}),
    Case("softcap", queries=3, options={"softcap": 2.0}),
]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is compiled, by name and options; it runs as it is."""
    calls: list[dict[str, Any]] = []

    def leave(function: Any, **options: Any) -> Any:
        calls.append({"name": function.__name__, **options})
        return function

    monkeypatch.setattr(torch, "compile", leave)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    specialization._compiled.cache_clear()
    yield calls
    specialization._compiled.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, compiled: list[dict[str, Any]]) -> None:
    q, k, v, chunks = case.tensors(dtype=torch.float64)
    out = case.run(q, k, v, chunks, "flex")
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out.numpy(), case.oracle(q, k, v, chunks).out, atol=1e-6)
    assert [call["fullgraph"] for call in compiled] == [True]


def test_values_may_be_wider_than_keys(compiled: list[dict[str, Any]]) -> None:
    case = Case("wide", queries=3, batch=2)
    q, k, v, chunks = case.tensors()
    wide = torch.cat([v, v + 1], -1)
    expected = case.oracle(q, k, wide, chunks).out
    np.testing.assert_allclose(case.run(q, k, wide, chunks, "flex").numpy(), expected, atol=1e-5)


def test_each_static_signature_is_compiled_once_and_under_a_name_of_its_own(compiled: list[dict[str, Any]]) -> None:
    """Lengths and numbers share a compilation; batch, heads, dtype and options do not, nor one query and several."""
    base: dict[str, Any] = {"n_fac": 6}

    def call(
        heads: int = 4, kv_heads: int = 2, batch: int = 1, length: int = 24, queries: int = 1, **options: Any
    ) -> None:
        dtype = options.pop("dtype", torch.float32)
        q = integers(batch, heads, queries, DIM, seed=0).to(dtype)
        k = integers(batch, kv_heads, length, DIM, seed=1).to(dtype)
        fasa_attention(q, k, k, pick_chunks(kv_heads, 2), backend="flex", **{**base, **options})

    for number, changes in enumerate(
        (
            {},
            {"batch": 2},
            {"heads": 2},
            {"kv_heads": 4},
            {"queries": 3},
            {"dtype": torch.float64},
            {"n_fac": 7},
            {"n_sink": 1},
            {"group_reduce": "mean"},
            {"scaling": 0.5},
            {"softcap": 3.0},
        ),
        start=1,
    ):
        call(**changes)
        assert len(compiled) == number, changes
        call(**changes, length=31)
        assert len(compiled) == number, changes
    call(queries=4)
    assert len(compiled) == number
    assert len({made["name"] for made in compiled}) == number


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shared", [True, False])
def test_learned_sinks_take_weight(
    compiled: list[dict[str, Any]], queries: int, softcap: float | None, shared: bool
) -> None:
    """On CPU only this way: its compiled kernel returns no normalizer."""
    case = Case(
        "sinks", batch=2, heads=6, queries=queries, n_fac=5, options={"group_reduce": "max" if shared else "none"}
    )
    q, k, v, chunks = case.tensors(dtype=torch.float64)
    sinks = torch.linspace(-2, 3, 6, dtype=torch.float64)
    softmax = Softmax(0.25, softcap, sinks)
    scores = torch.zeros(2, 2, 3, queries, 24)
    for b, h, i in np.ndindex(2, 6, queries):
        numbers = oracle.score(q[b, h, i].numpy(), k[b, h // 3].numpy(), chunks[h // 3].tolist())
        scores[b, h // 3, h % 3, i] = torch.from_numpy(numbers)
    if shared:
        scores = scores.amax(2, keepdim=True)
    selection = select(scores, valid_keys(queries, 24, None, q.device), Budget(5))
    without, lse = flex_focused(q, k, v, selection, softmax)
    out = with_sinks(without, lse, None, sinks)
    tensors = (x.numpy() for x in (q, k, v))
    options = {"group_reduce": "max" if shared else "none", "softcap": softcap, "sinks": sinks.numpy()}
    expected = oracle.fasa(*tensors, chunks.numpy(), n_fac=5, scaling=0.25, **options).out
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


def test_gradients_and_sinks_on_cpu_are_refused() -> None:
    case = Case("refused")
    q, k, v, chunks = case.tensors()
    for name in "qkv":
        tensors = {"q": q, "k": k, "v": v, name: {"q": q, "k": k, "v": v}[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match="computes no gradients"):
            fasa_attention(**tensors, chunks=chunks, n_fac=6, backend="flex")
        out = fasa_attention(**tensors, chunks=chunks, n_fac=6, backend="gather")
        assert out.requires_grad
    with pytest.raises(ValueError, match="no learned sinks on CPU"):
        fasa_attention(q, k, v, chunks, n_fac=6, backend="flex", sinks=torch.zeros(4))


def test_without_gradients_a_leaf_may_require_them(compiled: list[dict[str, Any]]) -> None:
    case = Case("no grad")
    q, k, v, chunks = case.tensors()
    with torch.no_grad():
        out = case.run(q.requires_grad_(), k, v, chunks, "flex")
    np.testing.assert_allclose(out.numpy(), case.oracle(q.detach(), k, v, chunks).out, atol=1e-5)


def test_the_partition_of_the_cpu_kernel_is_longer_than_any_cache(
    compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its template for one query splits longer keys into partitions, and misreads folded queries then."""
    options: list[Any] = []
    plain = method.flex_attention

    def note(*tensors: Any, **kwargs: Any) -> Any:
        options.append(kwargs["kernel_options"])
        return plain(*tensors, **{**kwargs, "kernel_options": None})

    monkeypatch.setattr(method, "flex_attention", note)
    case = Case("options")
    case.run(*case.tensors(), "flex")
    assert options[0]["PARTITION_SIZE"] >= 1 << 20


@pytest.mark.parametrize("backend", ["gather", "reference", "flex", "auto"])
def test_each_backend_is_the_one_that_was_asked_for(
    compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """All are right, so that a result does not tell; on CPU the automatic one gathers."""
    called: list[str] = []

    def noting(name: str, row: table.Row) -> table.Row:
        return row._replace(run=lambda call: (called.append(name), row.run(call))[1])

    monkeypatch.setattr(table, "BACKENDS", {name: noting(name, row) for name, row in table.BACKENDS.items()})
    case = Case("backend")
    case.run(*case.tensors(), backend)
    assert called == ["gather" if backend == "auto" else backend]
