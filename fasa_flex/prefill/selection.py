"""Selection of blocks of keys by their estimated attention: as many as a share, or a mass, of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.prefill.grid import Grid, rows_of_piece


@dataclass(frozen=True)
class BlockBudget:
    """How many blocks of keys a block of queries attends to.

    The first block, the diagonal one and the one before it are always taken, and count.

    Attributes:
        share: at most this share of the blocks up to the diagonal, rounded up.
        mass: the fewest blocks that hold this share of the estimated attention; None: as many as ``share`` allows.
    """

    share: float
    mass: float | None = None

    def allowed(self, numbers: Tensor) -> Tensor:
        """Most blocks of the blocks of queries with these numbers, int64 in the same shape, the diagonal included."""
        total = numbers + 1
        return torch.minimum(total, (self.share * total.double()).ceil().long().clamp(min=3))

    def covers(self, n_keys: int) -> bool:
        """Whether every block of queries among ``n_keys`` blocks attends to all blocks up to its own."""
        return self.mass is None and bool((self.allowed(numbers := torch.arange(n_keys)) > numbers).all())


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The selected blocks of keys of every block of queries; H is Hkv or Hq.

    Attributes:
        diagonal: int32 [R, M], the block of keys on the diagonal, which is selected, too.
        count: int32 [B, H, M], number of selected blocks before the diagonal.
        listed: int32 [B, H, M, K], their numbers; those behind the first ``count`` have no meaning.
    """

    diagonal: Tensor
    count: Tensor
    listed: Tensor

    def chosen(self, n_keys: int) -> Tensor:
        """Whether each of the blocks before the diagonal is selected: bool [B, H, M, n_keys]."""
        counts = torch.arange(self.listed.shape[3], device=self.count.device) < self.count[..., None]
        places = torch.where(counts, self.listed.long(), n_keys)
        found = torch.zeros(*self.count.shape, n_keys + 1, dtype=torch.bool, device=self.count.device)
        return found.scatter_(3, places, True)[..., :n_keys]

    def pairs(self, grid: Grid) -> Tensor:
        """Count pairs of a query block and a key block, over rows and heads: int64 [2], selected, and all causal ones.

        Blocks that pad a shorter row are not counted.
        """
        real = torch.arange(grid.n_queries) < torch.tensor(grid.blocks)[:, None]
        counted = real.to(self.count.device)[:, None]
        every = (grid.diagonal[:, None] + 1).expand_as(self.count)
        return torch.stack([((self.count + 1) * counted).sum(), (every * counted).sum()])


def all_blocks(grid: Grid, batch: int, heads: int) -> BlockLists:
    """Select every block up to the diagonal, which is dense attention."""
    diagonal, shape = grid.diagonal.int(), (batch, heads, grid.n_queries)
    listed = torch.arange(grid.n_keys, dtype=torch.int32, device=diagonal.device).expand(*shape, -1)
    return BlockLists(diagonal, diagonal[:, None].expand(shape), listed)


def select_blocks(mass: Tensor, grid: Grid, budget: BlockBudget) -> BlockLists:
    """Select the blocks of largest mass; ties go to the lower block.

    Args:
        mass: float [B, H, M, N], result of an estimator, one for each head that selects.
        grid: the blocks.
        budget: how many.
    """
    batch, heads, n_queries, n_keys = mass.shape
    diagonal = grid.diagonal
    most = int(budget.allowed(torch.arange(n_keys)).max()) - 1  # widest list, known without the device
    step = rows_of_piece(24 * batch * heads * n_keys, mass.is_cuda)
    parts = [
        _select(mass[:, :, at : at + step], diagonal[:, at : at + step], budget, most)
        for at in range(0, n_queries, step)
    ]
    count, listed = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    if budget.mass is not None:
        listed = listed[..., : max(1, int(count.max()))].contiguous()
    return BlockLists(diagonal.int(), count, listed)


def _select(mass: Tensor, diagonal: Tensor, budget: BlockBudget, most: int) -> tuple[Tensor, Tensor]:
    """Select for some blocks of queries, whose diagonals are ``diagonal``, int64 [R, m]."""
    number = torch.arange(mass.shape[-1], device=mass.device)
    own = diagonal[:, None, :, None]  # [R, 1, m, 1]
    mass = torch.where(number <= own, mass.float().clamp(min=0.0), 0.0)
    forced = (number == 0) | (number == own - 1)
    best = _ranked(mass, forced, number < own).topk(max(1, most), dim=-1).values
    listed = (len(number) - 1 - (best & _low_bits(len(number)))).clamp(min=0)  # unused entries are -1
    count = (budget.allowed(diagonal) - 1)[:, None].expand(mass.shape[:3])
    if budget.mass is not None:
        held = mass.gather(-1, listed.long()) * (best >= 0)
        before = mass.gather(-1, own.expand(*mass.shape[:3], 1)) + F.pad(held.cumsum(-1)[..., :-1], (1, 0))
        needed = (before < budget.mass * mass.sum(-1, keepdim=True)).sum(-1)
        count = torch.minimum(count, torch.maximum(needed, diagonal.clamp(max=2)[:, None]))
    return count.int(), listed


def _ranked(mass: Tensor, forced: Tensor, allowed: Tensor) -> Tensor:
    """Integers that order blocks by mass, forced ones first: int32 in the shape of ``mass``, -1 if not allowed.

    They are the bits of the float32 mass, with the block's number, counted from the end, in the lowest ones. Two masses
    that agree up to these bits, within a thousandth at 1024 blocks, are ordered by number; half the bytes of
    `rank_keys` are sorted.
    """
    low = _low_bits(mass.shape[-1])
    high = torch.where(forced, torch.iinfo(torch.int32).max, mass.contiguous().view(torch.int32)) & ~low
    backwards = torch.arange(mass.shape[-1] - 1, -1, -1, dtype=torch.int32, device=mass.device)
    return torch.where(allowed, high | backwards, -1)


def _low_bits(count: int) -> int:
    """The bits that numbers below ``count`` take."""
    return (1 << (count - 1).bit_length()) - 1
