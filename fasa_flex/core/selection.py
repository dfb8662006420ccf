"""Which keys each query attends to: validity, budget, forced tokens, top-k (the paper's T_t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.budget import Budget
from fasa_flex.core.ranking import INVALID, largest, rank_keys, slot_of


@dataclass(frozen=True)
class Selection:
    """The selected slots of every query; H is Hkv, and G is 1 where a GQA group shares its selection.

    Attributes:
        slots: int64 [B, H, G, Q, K], in any order; entries that do not count repeat the best slot.
        taken: bool [B, H, G, Q, K], which entries count: min(budget, valid keys) of them.
        order: int64 [B, H, G, Q, T], the ranking (`rank_keys`), INVALID where the key may not be selected.
    """

    slots: Tensor
    taken: Tensor
    order: Tensor

    @property
    def mask(self) -> Tensor:
        """The same sets by slot: bool [B, H, G, Q, T]."""
        lowest = self.order.gather(-1, self.slots).amin(-1, keepdim=True)
        return (self.order >= lowest) & (self.order > INVALID)

    @property
    def count(self) -> Tensor:
        """Selected tokens of each query: int64 [B, H, G, Q]."""
        return self.taken.sum(-1)


def valid_keys(q_len: int, kv_len: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Keys that may compete: causal (query i sits at slot T - Q + i) and real.

    Args:
        key_mask: bool [B, T], True = real token, or None: all real.

    Returns:
        bool [B or 1, 1, 1, Q, T].
    """
    last = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    causal = (torch.arange(kv_len, device=device) <= last)[None, None, None]
    return causal if key_mask is None else causal & key_mask[:, None, None, None]


SAMPLE_FIRST, SAMPLE_LAST, SAMPLE_STRIDE = 4, 64, 32
"""The sample of a query's valid keys: the first ones, the last ones, and every 32nd from the first on."""


class Marks(NamedTuple):
    """Keys that every layer of one forward treats alike; None where a call needs none.

    Attributes:
        forced: the keys that are always selected, the ``n_sink`` first and ``n_recent`` last valid ones of the query:
            bool, as the valid keys; [B, Hkv, 1, Q, T] where heads have budgets of their own.
        sample: slots of the valid keys whose mass weights are relative to (`SAMPLE_FIRST`): int64
            [B or 1, 1, 1, Q, S], -1 for none.
    """

    forced: Tensor | None
    sample: Tensor | None

    @classmethod
    def of(cls, valid: Tensor, budget: Budget, samples: bool) -> Marks:
        """For valid keys bool [B or 1, 1, 1, Q, T]; keys count by their number among the valid ones, not by slot."""
        forces = budget.n_sink != 0 or budget.n_recent != 0
        if not forces and not samples:
            return cls(None, None)
        number = valid.cumsum(-1)
        forced = None
        if forces:
            first, last = budget.forced(budget.n_fac if budget.is_count else budget.of(number[..., -1])[..., None])
            forced = valid & ((number <= first) | (number > number[..., -1:] - last))
        return cls(forced, _sample(number) if samples else None)

    def with_room(self, kv_len: int, free: int) -> Marks:
        """The same keys of T = ``kv_len``, with ``free`` slots behind them that are not valid; sizes are T + free's."""
        more = _strides(kv_len + free) - _strides(kv_len)
        forced = None if self.forced is None else F.pad(self.forced, (0, free))
        return Marks(forced, None if self.sample is None else F.pad(self.sample, (0, more), value=-1))


def _strides(kv_len: int) -> int:
    """Sampled slots of a stride, behind the first one."""
    return (kv_len - 1) // SAMPLE_STRIDE


def _sample(number: Tensor) -> Tensor:
    """`Marks.sample` from how many valid keys there are up to each slot."""
    count, kv_len = number[..., -1:], number.shape[-1]
    first = torch.arange(1, SAMPLE_FIRST + 1, device=number.device).expand(*number.shape[:-1], -1)
    strided = SAMPLE_STRIDE * torch.arange(1, _strides(kv_len) + 1, device=number.device) + 1
    last = count - torch.arange(SAMPLE_LAST, device=number.device)
    again = (last <= SAMPLE_FIRST) | ((last - 1) % SAMPLE_STRIDE == 0)
    wanted = torch.cat([first, strided.expand(*number.shape[:-1], -1), torch.where(again, 0, last)], dim=-1)
    slots = torch.searchsorted(number, wanted)
    return torch.where((wanted > 0) & (wanted <= count), slots, -1)


def forced_keys(valid: Tensor, budget: Budget) -> Tensor | None:
    """`Marks.forced`."""
    return Marks.of(valid, budget, samples=False).forced


def select(scores: Tensor, valid: Tensor, budget: Budget, forced: Tensor | None = None) -> Selection:
    """The budget's worth of best valid keys for every query, ties to the lower slot.

    Forced tokens come first: the ``n_sink`` first and ``n_recent`` last valid keys of the query, inside the budget.
    Shapes depend on the budget and T alone, so the function compiles without graph breaks.

    Args:
        scores: float [B, H, G, Q, T], ranked as float32.
        valid: bool [B or 1, 1, 1, Q, T].
        budget: of every query.
        forced: `Marks.forced`, where it is known.
    """
    if forced is None:
        forced = forced_keys(valid, budget)
    order = torch.where(valid, rank_keys(scores, first=forced), INVALID)
    varies = not isinstance(budget.n_fac, int)  # rows or heads take different numbers of keys, the best of those found
    best = largest(order, budget.widest(scores.shape[-1]))
    taken = best > INVALID
    if varies:
        best = best.sort(-1, descending=True).values
        taken = torch.arange(best.shape[-1], device=scores.device) < budget.of(valid.sum(-1))[..., None]
        taken = taken.expand(best.shape)
    best = torch.where(taken, best, best.amax(-1, keepdim=True))
    return Selection(slot_of(best, scores.shape[-1]), taken, order)
