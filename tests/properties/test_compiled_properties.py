"""Compiled = eager, and flex = gather: under a tracer (fast), and compiled for real (slow)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import PLAIN
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from properties.calls import Call, calls, cases, masks, whole

from fasa_flex import RotaryLayout, fasa_attention


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Around each test: hypothesis takes no fixture of the test's own, which would not begin anew with each example."""


@cases(0.05)
@given(calls(dtypes=(torch.float32,), reduces=("max", "mean", "none")), st.sampled_from(["gather", "flex"]))
@torch.no_grad()
def test_a_traced_call_is_the_eager_one(call: Call, backend: str) -> None:
    """One graph without a break; run by the tracer itself, where flex masks every score by the mask function."""
    torch._dynamo.reset()
    if backend == "flex":
        call = call.but(sinks=None)
    compiled = torch.compile(fasa_attention, fullgraph=True, backend="eager")
    options: dict[str, Any] = {"key_mask": call.key_mask, **call.options}
    out = compiled(call.q, call.k, call.v, call.chunks, backend=backend, **options)
    call.check(out, call.run("gather").double().numpy(), backend)


@dataclass(frozen=True)
class Signature:
    """What a compilation is specialised on; lengths, paddings and numbers differ from call to call.

    So may the number of queries, but not on CPU, where torch 2.13 generates code that does not compile when both vary.
    """

    heads: int
    kv_heads: int
    queries: int
    n_fac: float
    batch: int = 2
    dim: int = 16
    dtype: torch.dtype = torch.float32
    per_query_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SIGNATURES = {
    "decode": Signature(4, 2, 1, 8, options={"group_reduce": "max", "n_sink": 1, "n_recent": 1}),
    # 60 queries of a group of 3 fill two query blocks
    "several queries": Signature(6, 2, 60, 0.3, options={"group_reduce": "none", "n_recent": 1}),
}
MORE = {
    "one head": Signature(1, 1, 1, 5, batch=1),
    "multi-query attention": Signature(8, 1, 1, 0.25, options={"group_reduce": "mean"}),
    "group of 1, prefill": Signature(2, 2, 5, 7, options={"n_sink": 2}),
    "chunks per query head": Signature(6, 3, 1, 6, per_query_head=True),
    "softcap": Signature(4, 2, 9, 6, options={"softcap": 2.0, "scaling": 0.2}),
    "bfloat16": Signature(4, 2, 1, 6, dim=64, dtype=torch.bfloat16, options={"scaling": 0.01}),
}
IN_CI = settings().max_examples < 200


@st.composite
def calls_of(draw: st.DrawFn, signature: Signature) -> Call:
    s = signature
    length = draw(st.integers(max(3, s.queries), 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    limit = draw(st.integers(0, 3))
    order = torch.rand(s.heads if s.per_query_head else s.kv_heads, s.dim // 2, generator=generator).argsort(-1)[:, :3]
    return Call(
        q=whole(generator, limit, s.batch, s.heads, s.queries, s.dim).to(s.dtype),
        k=whole(generator, limit, s.batch, s.kv_heads, length, s.dim).to(s.dtype),
        v=torch.randn(s.batch, s.kv_heads, length, s.dim, generator=generator).to(s.dtype),
        chunks=RotaryLayout.half_split(s.dim).chunks[order],
        key_mask=draw(masks(s.batch, length).filter(lambda mask: mask is not None)),
        options={"n_fac": s.n_fac, **PLAIN, **s.options},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIGNATURES, *(() if IN_CI else MORE)])
@settings(cases(0.1), phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink would be to compile
@given(data=st.data())
@torch.no_grad()
def test_flex_is_gather_and_the_oracle(name: str, data: st.DataObject) -> None:
    call = data.draw(calls_of({**SIGNATURES, **MORE}[name]))
    expected = call.oracle().out
    for backend in ("flex", "gather"):
        call.check(call.run(backend), expected, backend)
