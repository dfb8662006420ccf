"""Calls of fasa_attention drawn by hypothesis, and how many of them each property makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fasa_flex import RotaryLayout, fasa_attention

EXACT = ("gather", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (2, 6, 16, 32, 64, 80, 128, 256)
_ROWS = 96  # of queries and heads in a call: the oracle is slow
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def cases(share: float) -> settings:
    """So many of the profile's ``max_examples``: shares follow cost, and sum up to about 25."""
    return settings(max_examples=max(2, round(settings().max_examples * share)))


@dataclass(frozen=True)
class Call:
    """Tensors and options of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    chunks: Tensor
    key_mask: Tensor | None
    options: dict[str, Any]

    def __repr__(self) -> str:
        mask = None if self.key_mask is None else self.key_mask.int().tolist()
        return (
            f"Call(q {tuple(self.q.shape)} {self.q.dtype}, k {tuple(self.k.shape)}, v {tuple(self.v.shape)}, "
            f"{self.chunks.tolist()}, {mask}, {self.options})"
        )

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def per_query_head(self) -> bool:
        return len(self.chunks) == self.q.shape[1] != self.k.shape[1]

    def but(self, **changes: Any) -> Call:
        """With other tensors or, for names that are no tensors, other options."""
        tensors = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        options = {name: value for name, value in changes.items() if name not in tensors}
        return replace(self, **{"options": {**self.options, **options}, **tensors})

    def run(self, backend: str, **options: Any) -> Tensor:
        tensors = (self.q, self.k, self.v, self.chunks)
        return fasa_attention(*tensors, key_mask=self.key_mask, backend=backend, **{**self.options, **options})

    def oracle(self) -> oracle.Result:
        mask = None if self.key_mask is None else self.key_mask.numpy()
        options = dict(self.options)
        if options.get("sinks") is not None:
            options["sinks"] = options["sinks"].double().numpy()
        tensors = (x.double().numpy() for x in (self.q, self.k, self.v))
        return oracle.fasa(*tensors, self.chunks.numpy(), key_mask=mask, **options)

    def check(self, out: Tensor, expected: np.ndarray, message: str = "") -> None:
        """Equal within what the rounding of logits and values can do."""
        assert out.dtype == self.q.dtype
        finite = self.v[self.v.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 1.0
        np.testing.assert_allclose(
            out.double().numpy(), expected, atol=self.rounding * largest, rtol=0, err_msg=message
        )

    @property
    def rounding(self) -> float:
        """How far logits and weights may be off; capped logits and sinks are computed in float32 at best."""
        scaling = self.options.get("scaling")
        scaling = self.q.shape[-1] ** -0.5 if scaling is None else scaling
        keys = self.k.double().repeat_interleave(self.group, 1)
        logits = float((self.q.double() @ keys.mT).nan_to_num(posinf=0, neginf=0).abs().max()) * scaling
        plain = self.options.get("softcap") is None and self.options.get("sinks") is None
        return (_ROUNDING[self.q.dtype] if plain else max(2e-6, _ROUNDING[self.q.dtype])) * (1 + logits)


def whole(generator: torch.Generator, limit: int, *shape: int) -> Tensor:
    """Whole numbers: scores are exact in every dtype, ties are common (all are for ``limit`` 0)."""
    return torch.randint(-limit, limit + 1, shape, generator=generator).double()


@st.composite
def layouts(draw: st.DrawFn, dim: int) -> RotaryLayout:
    """Half split or interleaved, whole or partial."""
    make = draw(st.sampled_from([RotaryLayout.half_split, RotaryLayout.interleaved]))
    return make(dim, draw(st.none() | st.integers(1, dim // 2).map(lambda n: 2 * n)))


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    """No mask, padding on either side (a whole row at times), or holes anywhere."""
    kind = draw(st.sampled_from(["none", "left", "right", "both", "holes"]))
    if kind == "none":
        return None
    if kind == "holes":
        row = st.lists(st.booleans(), min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    sizes = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    slots, zeros = torch.arange(length), torch.zeros(batch, 1, dtype=torch.long)
    left = zeros if kind == "right" else torch.tensor(draw(sizes))[:, None]
    right = zeros if kind == "left" else torch.tensor(draw(sizes))[:, None]
    return (slots >= left) & (slots < length - right)


@st.composite
def budgets(draw: st.DrawFn, length: int) -> dict[str, Any]:
    """n_fac as tokens or as a share, with forced tokens."""
    forced = {"n_sink": draw(st.integers(0, 3)), "n_recent": draw(st.integers(0, 3))}
    if draw(st.booleans()):
        return {"n_fac": draw(st.integers(max(1, sum(forced.values())), length + 6)), **forced}
    return {"n_fac": draw(st.sampled_from([0.01, 0.07, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])), **forced}


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    reduces: tuple[str, ...] = ("max", "mean", "none"),
    plain: bool = False,
    max_length: int = 27,
) -> Call:
    """Any call; whole-number queries and keys, so that the ranking is exact and ties are common."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    heads, length = kv_heads * group, draw(st.integers(1, max_length))
    queries = draw(st.integers(1, min(length, max(1, _ROWS // (batch * heads)))))
    dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(dtypes))
    limit = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q, k = whole(generator, limit, batch, heads, queries, dim), whole(generator, limit, batch, kv_heads, length, dim)

    layout = draw(layouts(dim))
    n_tip = draw(st.integers(1, min(dim // 2, 20)))
    rows = draw(st.sampled_from([kv_heads, heads]))
    order = torch.rand(rows, dim // 2, generator=generator).argsort(-1)[:, :n_tip]
    options = {**draw(budgets(length)), "group_reduce": draw(st.sampled_from(reduces))}
    bounded = 8 / (1 + limit**2 * dim)  # logits up to 8: half precision rounds larger ones away
    scales = [bounded] if dtype in (torch.bfloat16, torch.float16) else [None, 0.0, bounded, 0.25]
    options["scaling"] = draw(st.sampled_from(scales))
    if not plain:
        options["softcap"] = draw(st.sampled_from([None, None, 1.5, 30.0]))
        if draw(st.booleans()):
            options["sinks"] = 3 * torch.randn(heads, generator=generator)
    value_dim = draw(st.sampled_from([dim, 1, 5]))
    return Call(
        q=q.to(dtype),
        k=k.to(dtype),
        v=torch.randn(batch, kv_heads, length, value_dim, generator=generator, dtype=torch.float64).to(dtype),
        chunks=layout.chunks[order],
        key_mask=draw(masks(batch, length)),
        options=options,
    )
