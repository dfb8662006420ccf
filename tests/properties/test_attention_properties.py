"""fasa_attention on arbitrary shapes, budgets, paddings and forced tokens: gather = reference = oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fasa_flex import RotaryLayout, fasa_attention


@dataclass(frozen=True)
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    chunks: Tensor
    key_mask: Tensor | None
    options: dict[str, Any]

    def __repr__(self) -> str:
        mask = None if self.key_mask is None else self.key_mask.int().tolist()
        return f"Call(q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, {self.chunks.tolist()}, {mask}, {self.options})"

    def run(self, backend: str) -> Tensor:
        return fasa_attention(
            self.q,
            self.k,
            self.v,
            self.chunks,
            key_mask=self.key_mask,
            backend=backend,
            **self.options,
        )

    def oracle(self) -> oracle.Result:
        mask = None if self.key_mask is None else self.key_mask.numpy()
        tensors = (x.numpy() for x in (self.q, self.k, self.v))
        return oracle.fasa(*tensors, self.chunks.numpy(), key_mask=mask, **self.options)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Whole-number queries and keys in float64: rankings are exact, ties are common."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    length = draw(st.integers(1, 20))
    queries = draw(st.integers(1, length))
    dim = draw(st.sampled_from([2, 4, 8]))
    limit = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).double()

    layout = draw(st.sampled_from([RotaryLayout.half_split(dim), RotaryLayout.interleaved(dim)]))
    n_tip = draw(st.integers(1, dim // 2))
    rows = draw(st.sampled_from([kv_heads, kv_heads * group]))
    order = torch.rand(rows, dim // 2, generator=generator).argsort(-1)[:, :n_tip]

    n_sink, n_recent = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if draw(st.booleans()):
        n_fac: float = draw(st.integers(max(1, n_sink + n_recent), 25))
    else:
        n_fac, n_sink, n_recent = draw(st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])), 0, 0
    key_mask = draw(
        st.none() | st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    return Call(
        q=integers(batch, kv_heads * group, queries, dim),
        k=integers(batch, kv_heads, length, dim),
        v=torch.randn(batch, kv_heads, length, dim, generator=generator, dtype=torch.float64),
        chunks=layout.chunks[order],
        key_mask=None if key_mask is None else torch.tensor(key_mask),
        options={
            "n_fac": n_fac,
            "n_sink": n_sink,
            "n_recent": n_recent,
            "group_reduce": draw(st.sampled_from(["max", "mean", "none"])),
            "scaling": draw(st.sampled_from([None, 0.25, 1.0])),
        },
    )


@given(calls())
def test_gather_and_reference_equal_the_oracle(call: Call) -> None:
    expected = call.oracle().out
    for backend in ("gather", "reference"):
        np.testing.assert_allclose(call.run(backend).numpy(), expected, atol=1e-11, err_msg=backend)


@given(calls(), st.data())
def test_rows_queries_and_heads_are_independent(call: Call, data: st.DataObject) -> None:
    """Any one row, head group and query alone gives its slice of the whole."""
    batch, heads, queries, _ = call.q.shape
    kv_heads, length = call.k.shape[1:3]
    b, n, i = (data.draw(st.integers(0, size - 1)) for size in (batch, kv_heads, queries))
    group, end = heads // kv_heads, length - queries + i + 1
    members = slice(n * group, (n + 1) * group)
    alone = Call(
        q=call.q[b : b + 1, members, i : i + 1],
        k=call.k[b : b + 1, n : n + 1, :end],
        v=call.v[b : b + 1, n : n + 1, :end],
        chunks=call.chunks[members] if len(call.chunks) == heads else call.chunks[n : n + 1],
        key_mask=None if call.key_mask is None else call.key_mask[b : b + 1, :end],
        options=call.options,
    )
    torch.testing.assert_close(alone.run("gather")[0, :, 0], call.run("gather")[b, members, i], atol=1e-11, rtol=0)


@given(calls())
def test_what_was_not_selected_does_not_matter(call: Call) -> None:
    """Values outside every head's selection may be anything; so may masked keys."""
    group = call.q.shape[1] // call.k.shape[1]
    used = torch.zeros(call.k.shape[:3], dtype=torch.bool)
    for (b, h, _), slots in call.oracle().selected.items():
        used[b, h // group, slots] = True
    before = call.run("gather")
    value = torch.where(used[..., None], call.v, 1e9)
    assert torch.equal(Call(call.q, call.k, value, call.chunks, call.key_mask, call.options).run("gather"), before)
    if call.key_mask is not None:
        key = torch.where(call.key_mask[:, None, :, None], call.k, 77.0)
        assert torch.equal(Call(call.q, key, value, call.chunks, call.key_mask, call.options).run("gather"), before)
