"""Estimators: how much of its attention each block of queries pays to each block of keys.

An estimator is one function from `Blocks` to a float tensor, so that another one is a few lines:

    def by_mean(blocks: Blocks) -> Tensor:
        query, key = (states.mean(-2) for states in (blocks.queries(range(BLOCK)), blocks.keys(range(BLOCK))))
        return (blocks.softmax.scaling * query @ key[:, :, None].mT).exp()

It reads the dominant dimensions alone. The estimators here compute attention between a few representatives of each
block, in pieces: no matrix of all their scores is ever stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.pieces import rows_that_fit
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.prefill.grid import BLOCK, Grid, take

_ON_CUDA = 4
"""Pieces on a GPU are this many times as large: each takes several launches."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Queries and keys of one layer's prefill, in blocks of a grid.

    Attributes:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE.
        scorer: the dominant dimensions of each head; H heads have their own, Hkv or Hq.
        grid: the blocks.
        softmax: scaling and logit cap of the model's attention.
    """

    query: Tensor
    key: Tensor
    scorer: DominantChunks
    grid: Grid
    softmax: Softmax

    def queries(self, places: Sequence[int]) -> Tensor:
        """Dominant dimensions of the queries at S ``places`` of every block: [B, H, G, M, S, P].

        G is the number of query heads that share their dimensions. A place without a query repeats the nearest one.
        """
        rows = take(self.query, self.grid.queries_at(places))
        heads = len(self.scorer.dims)
        shape = (len(rows), heads, rows.shape[1] // heads, self.grid.n_queries, len(places), -1)
        return self.scorer.of_query(rows).view(shape)

    def keys(self, places: Sequence[int]) -> Tensor:
        """Dominant dimensions of the keys at S ``places`` of every block: [B, H, N, S, P]."""
        rows = take(self.key, self.grid.slots_at(places))
        rows = rows.repeat_interleave(len(self.scorer.dims) // rows.shape[1], dim=1)
        # the mean key would shift all logits of a query alike, which a softmax does not see
        packed = replace(self.scorer, mean_key=None).pack(rows)
        return packed.view(*packed.shape[:2], self.grid.n_keys, len(places), -1)

    def of_all_dimensions(self) -> Blocks:
        """The same blocks with all dimensions of each key/value head as the dominant ones."""
        heads, dim = self.key.shape[1], self.key.shape[3]
        return replace(self, scorer=DominantChunks(torch.arange(dim, device=self.key.device).expand(heads, -1)))


BlockEstimator = Callable[[Blocks], Tensor]
"""Returns non-negative estimates, float [B, H, G or 1, M, N], of the attention that block m of queries pays to block n
of keys. They are compared along N alone; those behind the diagonal are not read."""


def attention_mass(blocks: Blocks, query: Tensor, key: Tensor) -> Tensor:
    """Compute attention between representatives, summed over blocks of keys and averaged over those of queries.

    Representative i of S in a block stands for 128 / S tokens, which may attend to the tokens of a representative of
    keys that begin before they end.

    Args:
        blocks: the blocks.
        query: float [B, H, G, M, S, P], representatives of the queries.
        key: float [B, H, N, S', P], of the keys.

    Returns:
        float32 [B, H, G, M, N]; each row sums to 1, and is 0 behind the diagonal.
    """
    grid, softmax, n_keys = blocks.grid, blocks.softmax, key.shape[2]
    row_bytes = 4 * query[:, :, :, 0, :, 0].numel() * n_keys * key.shape[3]
    step = rows_that_fit(row_bytes // (_ON_CUDA if query.is_cuda else 1))
    compute = _compiled() if query.is_cuda and not torch.is_grad_enabled() else _mass_of_piece
    parts = []
    for at in range(0, grid.n_queries, step):
        seen = min(n_keys, max(grid.begins) + at + step)
        piece = (query[:, :, :, at : at + step], key[:, :, :seen], grid.first + at)
        parts.append(F.pad(compute(*piece, softmax.scaling, softmax.softcap), (0, n_keys - seen)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _mass_of_piece(query: Tensor, key: Tensor, first: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Compute `attention_mass` of some blocks of queries, the first of which has the numbers ``first``, int64 [R]."""
    (_, _, group, m, s, _), (_, _, n, r, _) = query.shape, key.shape
    scores = dot_products(query.flatten(2, 4), key.flatten(2, 3))
    logits = Softmax(scaling, softcap).logits(scores).unflatten(3, (n, r)).unflatten(2, (group, m, s))
    ends = BLOCK * first[:, None, None] + BLOCK * torch.arange(m, device=query.device)[:, None]
    ends = ends + (torch.arange(s, device=query.device) + 1) * (BLOCK // s)  # [R, m, S]
    begins = torch.arange(n * r, device=query.device).view(n, r) * (BLOCK // r)
    visible = (begins < ends[..., None, None])[:, None, None]
    return torch.where(visible, logits, -torch.inf).logsumexp(-1).softmax(-1).mean(4)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`_mass_of_piece` compiled: one kernel behind the matrix product reads each score once."""
    compiled: Callable[..., Tensor] = torch.compile(_mass_of_piece, dynamic=True)
    return compiled


def strided(blocks: Blocks, stride: int = 16) -> Tensor:
    """Every ``stride``-th query and key represents those around it."""
    places = range(stride // 2, BLOCK, stride)
    return attention_mass(blocks, blocks.queries(places), blocks.keys(places))


def pooled(blocks: Blocks, size: int = 16) -> Tensor:
    """The mean of ``size`` queries or keys represents them."""
    query, key = blocks.queries(range(BLOCK)), blocks.keys(range(BLOCK))
    return attention_mass(blocks, *(states.unflatten(-2, (-1, size)).mean(-2) for states in (query, key)))


def antidiagonal(blocks: Blocks, size: int = 8) -> Tensor:
    """The mean logit on the antidiagonal of each tile of ``size`` queries and keys (XAttention: Xu et al., 2025)."""
    query, key = blocks.queries(range(BLOCK)), blocks.keys(range(BLOCK))
    tiles: list[Any] = [states.unflatten(-2, (-1, size)) for states in (query, key)]
    return attention_mass(blocks, tiles[0].flatten(-2) / size, tiles[1].flip(-2).flatten(-2))


def oracle(blocks: Blocks) -> Tensor:
    """The true attention of all dimensions; as slow as dense attention, to measure the others against."""
    whole = blocks.of_all_dimensions()
    return attention_mass(whole, whole.queries(range(BLOCK)), whole.keys(range(BLOCK)))
