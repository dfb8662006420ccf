"""One call of fasa_attention as data: shapes, padding and options; run by the library or by the oracle.

Queries and keys are small whole numbers: every score is exact in float32, ties abound, and oracle and library cannot
disagree by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from torch import Tensor

from fasa_flex import FasaConfig, RotaryLayout, fasa_attention

EXACT = ("reference", "gather")  # run eagerly, in any dtype
DIM = 16
PLAIN: dict[str, Any] = {"n_sink": 0, "n_recent": 0, "group_reduce": "max"}
"""Options of a call of `fasa_attention` that forces no token, and ranks by numbers that are whole where scores are."""


def plain(**changes: Any) -> FasaConfig:
    """TIP and FAC alone: chunks by agreement in the cache's precision, nothing forced, nothing completed.

    As the paper has it, but with one selection for the heads of a group and a dense first layer.
    """
    return FasaConfig.paper(**{"per": "kv_head", "dense_layers": (0,), **changes})


def unrounded(**changes: Any) -> FasaConfig:
    """The defaults with keys that rank as they are: a key computed in two ways may round to two codes of four bits."""
    return FasaConfig(**{"packed_dtype": None, **changes})


def plain_attention(*tensors: Tensor, **options: Any) -> Tensor:
    """`fasa_attention` with the options PLAIN, unless told otherwise."""
    return fasa_attention(*tensors, **{**PLAIN, **options})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(*shape: int, seed: int, limit: int = 2) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=generator(seed)).float()


def pick_chunks(heads: int, n_tip: int, seed: int = 3, dim: int = DIM) -> Tensor:
    """Different chunks for every head: [heads, n_tip, 2]."""
    pairs = RotaryLayout.half_split(dim).chunks
    order = torch.rand(heads, dim // 2, generator=generator(seed)).argsort(-1)[:, :n_tip].sort(-1).values
    return pairs[order]


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    length: int = 24
    n_tip: int = 2
    n_fac: float = 6
    per_query_head: bool = False
    left: tuple[int, ...] = ()  # padding of each row
    right: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key_mask(self) -> Tensor | None:
        if not self.left and not self.right:
            return None
        slots = torch.arange(self.length)
        left, right = self.left or (0,) * self.batch, self.right or (0,) * self.batch
        return torch.stack([(slots >= a) & (slots < self.length - b) for a, b in zip(left, right, strict=True)])

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = integers(self.batch, self.heads, self.queries, DIM, seed=seed)
        k = integers(self.batch, self.kv_heads, self.length, DIM, seed=seed + 1)
        v = torch.randn(self.batch, self.kv_heads, self.length, DIM, generator=generator(seed + 2))
        chunks = pick_chunks(self.heads if self.per_query_head else self.kv_heads, self.n_tip)
        return q.to(dtype), k.to(dtype), v.to(dtype), chunks

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, chunks: Tensor) -> oracle.Result:
        mask = self.key_mask
        return oracle.fasa(
            *(x.double().numpy() for x in (q, k, v)),
            chunks.numpy(),
            n_fac=self.n_fac,
            key_mask=None if mask is None else mask.numpy(),
            **{**PLAIN, **self.options},
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, backend: str) -> Tensor:
        options = {"n_fac": self.n_fac, "key_mask": self.key_mask, "backend": backend, **self.options}
        return plain_attention(q, k, v, chunks, **options)
