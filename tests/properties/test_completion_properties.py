"""Completed attention on arbitrary masks, budgets and softmaxes: the oracle's numbers, and what does not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import torch
from completed import attend, state_of
from hypothesis import assume, given
from hypothesis import strategies as st
from properties.calls import EXACT, cases, masks, whole
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.group_reduce import reduce_group
from fasa_flex.core.selection import Marks, valid_keys
from fasa_flex.core.softmax import Softmax


@dataclass(frozen=True)
class Completed:
    """One call: tensors, and what the library and the oracle are told alike."""

    q: Tensor
    k: Tensor
    v: Tensor
    chunks: Tensor
    key_mask: Tensor | None
    softmax: Softmax
    mean_key: Tensor | None
    options: dict[str, Any]

    def run(self, backend: str, q: Tensor | None = None, state: Any = None) -> Tensor:
        options = dict(self.options)
        forced = (options.pop("n_sink"), options.pop("n_recent"))
        tensors = (self.q if q is None else q, self.k, self.v, self.chunks)
        how = {"softmax": self.softmax, "mean_key": self.mean_key, "key_mask": self.key_mask}
        return attend(*tensors, backend=backend, state=state, forced=forced, **how, **options)

    def oracle(self) -> oracle.Result:
        sinks = None if self.softmax.sinks is None else self.softmax.sinks.double().numpy()
        mean = None if self.mean_key is None else self.mean_key.double().numpy()
        return oracle.fasa(
            *(x.double().numpy() for x in (self.q, self.k, self.v)),
            self.chunks.numpy(),
            key_mask=None if self.key_mask is None else self.key_mask.numpy(),
            scaling=self.softmax.scaling,
            softcap=self.softmax.softcap,
            mean_key=mean,
            sinks=sinks,
            **self.options,
        )

    def check(self, out: Tensor, expected: np.ndarray, message: str = "") -> None:
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-4, rtol=0, err_msg=message)


@st.composite
def calls(draw: st.DrawFn) -> Completed:
    """Whole-number queries, keys and mean keys, so that every ranking is exact; logits up to 6."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length, queries, dim = draw(st.integers(40, 140)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 6, 16]))
    limit = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = draw(st.sampled_from([kv_heads, kv_heads * group]))
    order = torch.rand(rows, dim // 2, generator=generator).argsort(-1)[:, : draw(st.integers(1, dim // 2))]
    forced = {name: draw(st.sampled_from([None, 0, 2])) for name in ("n_sink", "n_recent")}
    sinks = 2 * torch.randn(kv_heads * group, generator=generator) if draw(st.booleans()) else None
    centred = rows == kv_heads and draw(st.booleans())
    return Completed(
        q=whole(generator, limit, batch, kv_heads * group, queries, dim),
        k=whole(generator, limit, batch, kv_heads, length, dim),
        v=torch.randn(batch, kv_heads, length, draw(st.sampled_from([1, 5])), generator=generator).double(),
        chunks=torch.stack([2 * order, 2 * order + 1], -1),
        key_mask=draw(masks(batch, length)),
        softmax=Softmax(6 / (limit**2 * dim), draw(st.sampled_from([None, None, 1.5])), sinks),
        mean_key=whole(generator, limit, kv_heads, dim).float() if centred else None,
        options={
            "n_fac": draw(st.sampled_from([4, 12, 30, 100, 0.1, 0.5])),
            "group_reduce": draw(st.sampled_from(["max", "mean", "none"])),
            "strength": draw(st.sampled_from([0.0, 0.5, 1.0])),
            **forced,
        },
    )


@cases(1.5)
@given(calls())
def test_by_a_state_or_without_it_equals_the_oracle(call: Completed) -> None:
    expected = call.oracle().out
    state = state_of(call.k, call.v, call.key_mask, call.options["strength"] != 0)
    for backend in EXACT:
        call.check(call.run(backend), expected, backend)
        call.check(call.run(backend, call.q[:, :, -1:], state), expected[:, :, -1:], f"{backend}, by a state")


@cases(1)
@given(calls(), st.integers(0, 2**20))
def test_the_order_of_covered_unselected_tokens_does_not_matter(call: Completed, seed: int) -> None:
    """Row by row and head by head, of those that no query of the group has selected; numbers without ties."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (call.q, call.k))
    call = replace(call, q=q, k=k, softmax=replace(call.softmax, scaling=0.5))
    before = call.oracle()
    assume(before.margin > 1e-4)
    k, v = call.k.clone(), call.v.clone()
    length, queries, group = k.shape[2], q.shape[2], q.shape[1] // k.shape[1]
    for b, n in np.ndindex(*k.shape[:2]):
        mask = None if call.key_mask is None else call.key_mask[b].tolist()
        valid = oracle.valid_keys(length - queries, mask)  # of the first query, which covers the fewest
        used = {j for (row, h, _), slots in before.selected.items() if (row, h // group) == (b, n) for j in slots}
        free = torch.tensor([j for j in valid[4 : len(valid) // 64 * 64] if j not in used], dtype=torch.long)
        turned = free[torch.randperm(len(free), generator=generator)]
        k[b, n, free], v[b, n, free] = call.k[b, n, turned], call.v[b, n, turned]
    assume(not torch.equal(k, call.k))
    call.check(replace(call, k=k, v=v).run("gather"), call.run("gather").numpy())


@cases(1)
@given(
    st.integers(1, 260),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    st.sampled_from([None, 1.5]),
    st.data(),
)
def test_a_sampled_ranking_is_the_oracles(
    length: int, seed: int, size: float, softcap: float | None, data: st.DataObject
) -> None:
    """In the log domain it is finite whatever the logits, and as exact as they are."""
    mask = data.draw(masks(1, length))
    scores = size * torch.randn(1, 1, 2, 1, length, generator=torch.Generator().manual_seed(seed))
    valid = valid_keys(1, length, mask, scores.device)
    sample = Marks.of(valid, Budget(4), samples=True).sample
    ranking = reduce_group(scores, valid, "softmax", Softmax(0.5, softcap), sample).flatten()
    keys = valid.flatten().nonzero().flatten().tolist()
    assert sorted(slot for slot in sample.flatten().tolist() if slot >= 0) == oracle.sample(keys)
    assert ranking[keys].isfinite().all()
    if keys:
        expected = oracle.reduce_group(scores[0, 0, :, 0].double().numpy(), keys, "softmax", 0.5, softcap)[keys]
        np.testing.assert_allclose(ranking[keys].numpy(), expected, rtol=1e-5, atol=2e-5 + 1e-6 * size)
