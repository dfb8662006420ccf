"""Agreement, budgets and selections on arbitrary inputs."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fasa_flex import RotaryLayout, contextual_agreement
from fasa_flex.budget import Budget
from fasa_flex.selection import select, valid_keys

shares = st.floats(1e-6, 1.0, exclude_min=True).map(lambda share: round(share, 6)).filter(lambda share: 0 < share <= 1)
budgets = st.integers(1, 5000) | shares


@given(budgets, st.lists(st.integers(0, 100_000), min_size=1, max_size=20))
def test_budget_equals_the_oracle(n_fac: float, n_valid: list[int]) -> None:
    assert Budget(n_fac).of(torch.tensor(n_valid)).tolist() == [oracle.budget(n_fac, n) for n in n_valid]


@given(budgets, st.integers(1, 5000))
def test_the_widest_budget_is_that_of_the_whole_cache(n_fac: float, length: int) -> None:
    assert Budget(n_fac).widest(length) == int(Budget(n_fac).of(torch.arange(length + 1)).max())


@given(st.data())
def test_agreement_equals_the_oracle(data: st.DataObject) -> None:
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    length = data.draw(st.integers(2, 16))
    queries, top_k = data.draw(st.integers(1, length)), data.draw(st.integers(1, length))
    dim, limit = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.integers(0, 4))
    layout = data.draw(st.sampled_from([RotaryLayout.half_split(dim), RotaryLayout.interleaved(dim)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    q = torch.randint(-limit, limit + 1, (batch, kv_heads * group, queries, dim), generator=generator).float()
    k = torch.randint(-limit, limit + 1, (batch, kv_heads, length, dim), generator=generator).float()
    table = contextual_agreement(q, k, layout, top_k=top_k)
    expected = oracle.contextual_agreement(q.double().numpy(), k.double().numpy(), layout.chunks.tolist(), top_k)
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)
    assert 0 <= float(table.min()) <= float(table.max()) <= 1


@given(st.data())
def test_selection_contracts(data: st.DataObject) -> None:
    """Selected within valid, of the budget's size, forced tokens in, nothing better left out, ties to the lower."""
    length = data.draw(st.integers(1, 24))
    scores = data.draw(
        st.lists(
            st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0]), min_size=length, max_size=length
        )
    )
    real = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    assume(any(real))
    n_sink, n_recent = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    n_fac = data.draw(st.integers(max(1, n_sink + n_recent), 30))
    valid = valid_keys(1, length, torch.tensor([real]), torch.device("cpu"))
    selection = select(torch.tensor(scores).view(1, 1, 1, 1, -1), valid, Budget(n_fac, n_sink, n_recent))

    slots = selection.mask.flatten().nonzero().flatten().tolist()
    real_slots = [j for j in range(length) if real[j]]
    assert set(slots) <= set(real_slots)
    assert len(slots) == min(n_fac, len(real_slots)) == int(selection.count)
    forced = {*real_slots[:n_sink], *real_slots[len(real_slots) - n_recent :]}
    assert forced <= set(slots)
    for j in set(slots) - forced:
        for other in set(real_slots) - set(slots):
            assert scores[j] > scores[other] or (scores[j] == scores[other] and j < other)


@given(st.integers(1, 40).map(lambda n: 2 * n), st.data())
def test_layouts_pair_every_dimension_once(head_dim: int, data: st.DataObject) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    for make in (RotaryLayout.half_split, RotaryLayout.interleaved):
        layout = make(head_dim, rotary_dim)
        assert sorted(layout.chunks.flatten().tolist()) == list(range(head_dim))
        assert sorted(layout.chunks[: rotary_dim // 2].flatten().tolist()) == list(range(rotary_dim))
