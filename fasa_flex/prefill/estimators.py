"""Estimators: how much of its attention each block of queries pays to each block of keys.

An estimator is one function from `Blocks` to a float tensor, so that another one is a few lines:

    def by_means(blocks: Blocks) -> Tensor:
        query, key = blocks.mean_queries(BLOCK)[..., 0, :], blocks.mean_keys(BLOCK)[:, :, None, :, 0]
        return (blocks.softmax.scaling * query.float() @ key.float().mT).exp()

It reads the dominant dimensions alone. The estimators here compute attention between a few representatives of each
block, in pieces: no matrix of all their scores is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.prefill.grid import BLOCK, Grid, rows_of_piece, take


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
        return self._packed_queries(take(self.query, self.grid.queries_at(places)))

    def keys(self, places: Sequence[int]) -> Tensor:
        """Dominant dimensions of the keys at S ``places`` of every block: [B, H, N, S, P]."""
        return self._packed_keys(take(self.key, self.grid.slots_at(places)))

    def mean_queries(self, size: int) -> Tensor:
        """Means of ``size`` queries one after the other, S = 128 / size for a block: [B, H, G, M, S, P]."""
        rows = self.query if self.grid.in_order else take(self.query, self.grid.queries)
        return self._packed_queries(_means(rows, self.grid.queries, size))

    def mean_keys(self, size: int) -> Tensor:
        """Means of ``size`` keys one after the other: [B, H, N, S, P]."""
        grid = self.grid
        in_place = grid.is_packed and grid.tokens is not None
        rows = self.key[:, :, : grid.tokens] if in_place else take(self.key, grid.slots)
        return self._packed_keys(_means(rows, self.grid.slots, size))

    def _packed_queries(self, rows: Tensor) -> Tensor:
        heads = len(self.scorer.dims)
        shape = (len(rows), heads, rows.shape[1] // heads, self.grid.n_queries, rows.shape[2] // self.grid.n_queries)
        packed: Tensor = self.scorer.of_query(rows).view(*shape, -1)
        return packed

    def _packed_keys(self, rows: Tensor) -> Tensor:
        rows = rows.repeat_interleave(len(self.scorer.dims) // rows.shape[1], dim=1)
        # the mean key would shift all logits of a query alike, which a softmax does not see
        packed = replace(self.scorer, mean_key=None).pack(rows)
        by_block: Tensor = packed.view(*packed.shape[:2], self.grid.n_keys, -1, packed.shape[3])
        return by_block

    def of_all_dimensions(self) -> Blocks:
        """The same blocks with all dimensions of each key/value head as the dominant ones."""
        heads, dim = self.key.shape[1], self.key.shape[3]
        return replace(self, scorer=DominantChunks(torch.arange(dim, device=self.key.device).expand(heads, -1)))


BlockEstimator = Callable[[Blocks], Tensor]
"""Returns non-negative estimates, float [B, H, G or 1, M, N], of the attention that block m of queries pays to block n
of keys. They are compared along N alone; those behind the diagonal are not read."""


def _means(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Means of ``size`` rows of [B, H, T, D]; the last row is repeated up to the length of ``index``."""
    missing = index.shape[1] - rows.shape[2]
    if missing > 0:
        rows = torch.cat([rows, rows[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    means: Tensor = rows.unflatten(2, (-1, size)).mean(3)
    return means


def attention_mass(
    blocks: Blocks, query: Tensor, key: Tensor, by_head: bool = False, strongest: bool = False
) -> Tensor:
    """Compute attention between representatives, summed over blocks of keys and averaged over those of queries.

    Representative i of S in a block stands for 128 / S tokens, which may attend to the tokens of a representative of
    keys that begin before they end.

    Args:
        blocks: the blocks.
        query: float [B, H, G, M, S, P], representatives of the queries.
        key: float [B, H, N, S', P], of the keys.
        by_head: whether each query head has estimates of its own; else those of a group are averaged.
        strongest: whether the largest attention among the queries of a block, and of a group, counts, not the mean.

    Returns:
        float32 [B, H, G or 1, M, N]; 0 behind the diagonal.
    """
    grid, softmax, n_keys = blocks.grid, blocks.softmax, key.shape[2]
    if _few(query, key, by_head):
        from fasa_flex.backends.triton.blocks import mass_by_kernel  # Triton is installed with CUDA only

        return mass_by_kernel(query, key, grid.first, softmax.scaling, softmax.softcap, by_head, strongest)
    row_bytes = 4 * query[:, :, :, 0, :, 0].numel() * n_keys * key.shape[3]
    step = rows_of_piece(row_bytes, query.is_cuda)
    parts = []
    for at in range(0, grid.n_queries, step):
        seen = min(n_keys, max(grid.begins) + at + step)
        piece, keys = query[:, :, :, at : at + step], key[:, :, :seen]
        scores = dot_products(piece.flatten(2, 4), keys.flatten(2, 3))
        scores = scores.unflatten(3, keys.shape[2:4]).unflatten(2, piece.shape[2:5])
        mass = _mass_of_scores(scores, grid.first + at, softmax, by_head, strongest)
        parts.append(F.pad(mass, (0, n_keys - seen)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _few(query: Tensor, key: Tensor, by_head: bool) -> bool:
    """Whether the kernel holds a block's representatives in registers, as those of `pooled` and `strided`."""
    rows, width = query.shape[4] * (1 if by_head else query.shape[2]), query.shape[5]
    small = rows <= 64 and width * query.element_size() <= 256 and query.element_size() <= 4
    powers_of_two = all(number & (number - 1) == 0 for number in (query.shape[4], key.shape[3]))
    differentiates = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return query.is_cuda and not differentiates and small and powers_of_two


def _mass_of_scores(scores: Tensor, first: Tensor, softmax: Softmax, by_head: bool, strongest: bool) -> Tensor:
    """Compute `attention_mass` of the scores of some blocks of queries, float32 [B, H, G, m, S, n, S'].

    The first of these blocks has the numbers ``first``, int64 [R].
    """
    m, s, n, r = scores.shape[3:]
    logits, device = softmax.logits(scores), scores.device
    ends = BLOCK * first[:, None, None] + BLOCK * torch.arange(m, device=device)[:, None]
    ends = ends + (torch.arange(s, device=device) + 1) * (BLOCK // s)  # [R, m, S]
    begins = torch.arange(n * r, device=device).view(n, r) * (BLOCK // r)
    visible = (begins < ends[..., None, None])[:, None, None]
    mass = torch.where(visible, logits, -torch.inf).logsumexp(-1).softmax(-1)  # [B, H, G, m, S, n]
    mass = mass.amax(4) if strongest else mass.mean(4)
    if by_head:
        return mass
    return mass.amax(2, keepdim=True) if strongest else mass.mean(2, keepdim=True)


def pooled(blocks: Blocks, size: int = 32, by_head: bool = False, strongest: bool = False) -> Tensor:
    """The mean of ``size`` queries or keys represents them; options are those of `attention_mass`."""
    return attention_mass(blocks, blocks.mean_queries(size), blocks.mean_keys(size), by_head, strongest)


def strided(blocks: Blocks, stride: int = 16, by_head: bool = False, strongest: bool = False) -> Tensor:
    """One of ``stride`` queries or keys represents them."""
    places = range(stride // 2, BLOCK, stride)
    return attention_mass(blocks, blocks.queries(places), blocks.keys(places), by_head, strongest)


def antidiagonal(blocks: Blocks, size: int = 8, by_head: bool = False, strongest: bool = False) -> Tensor:
    """The mean logit on the antidiagonal of each tile of ``size`` queries and keys (XAttention: Xu et al., 2025)."""
    query = blocks.queries(range(BLOCK)).unflatten(-2, (-1, size)).flatten(-2) / size
    key = blocks.keys(range(BLOCK)).unflatten(-2, (-1, size)).flip(-2).flatten(-2)
    return attention_mass(blocks, query, key, by_head, strongest)


def oracle(blocks: Blocks, by_head: bool = False, strongest: bool = False) -> Tensor:
    """The true attention of all dimensions; slower than dense attention, to measure the others against."""
    whole = blocks.of_all_dimensions()
    return attention_mass(whole, whole.queries(range(BLOCK)), whole.keys(range(BLOCK)), by_head, strongest)
