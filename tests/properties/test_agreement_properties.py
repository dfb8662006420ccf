"""Contextual agreement on arbitrary heads, lengths, layouts and dtypes, against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import cases, layouts, whole
from torch import Tensor

from fasa_flex import RotaryLayout, contextual_agreement


@st.composite
def heads(draw: st.DrawFn) -> tuple[Tensor, Tensor, RotaryLayout, int]:
    """Queries, keys, a layout and K; whole numbers, so that rankings are exact and ties are common."""
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    length = draw(st.integers(1, 17))
    queries, top_k = draw(st.integers(1, min(length, 6))), draw(st.integers(1, length))
    dim, limit = draw(st.sampled_from([2, 4, 6, 8, 16, 30])), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q, k = (
        whole(generator, limit, batch, kv_heads * group, queries, dim),
        whole(generator, limit, batch, kv_heads, length, dim),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return q.to(dtype), k.to(dtype), draw(layouts(dim)), top_k


@cases(1)
@given(heads())
def test_agreement_equals_the_oracle(inputs: tuple[Tensor, Tensor, RotaryLayout, int]) -> None:
    q, k, layout, top_k = inputs
    table = contextual_agreement(q, k, layout, top_k=top_k)
    expected = oracle.contextual_agreement(q.double().numpy(), k.double().numpy(), layout.chunks.tolist(), top_k)
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)
    assert 0 <= float(table.min()) <= float(table.max()) <= 1
    if top_k == k.shape[2]:
        assert (table == 1).all()


@cases(0.5)
@given(heads(), st.randoms(use_true_random=False))
def test_agreement_follows_heads_and_chunks(inputs: tuple[Tensor, Tensor, RotaryLayout, int], random: object) -> None:
    """Permuted heads and chunks permute the table; the mean over a batch is the mean of its rows."""
    q, k, layout, top_k = inputs
    table = contextual_agreement(q, k, layout, top_k=top_k)
    group, kv_order = q.shape[1] // k.shape[1], random.sample(range(k.shape[1]), k.shape[1])
    order = [n * group + g for n in kv_order for g in random.sample(range(group), group)]
    chunks = random.sample(range(len(layout.chunks)), len(layout.chunks))
    moved = contextual_agreement(q[:, order], k[:, kv_order], RotaryLayout(layout.chunks[chunks].flip(1), 1), top_k)
    assert torch.equal(moved, table[order][:, chunks])
    rows = [contextual_agreement(q[b : b + 1], k[b : b + 1], layout, top_k) for b in range(len(q))]
    torch.testing.assert_close(torch.stack(rows).mean(0), table, atol=1e-6, rtol=0)
