"""Selection of the keys that each query attends to: valid keys, forced tokens, top-k (the paper's T_t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.budget import Budget
from fasa_flex.core.ranking import INVALID, largest, rank_keys, slot_of


@dataclass(frozen=True)
class Selection:
    """The selected slots of every query; H is Hkv, and G is 1 if a GQA group shares its selection.

    Attributes:
        slots: int64 [B, H, G, Q, K], unsorted; unused entries repeat the best slot.
        taken: bool [B, H, G, Q, K], the entries of ``slots`` in use: min(budget, valid keys) of them.
        order: int64 [B, H, G, Q, T], integers of `rank_keys`; INVALID: the key may not be selected.
    """

    slots: Tensor
    taken: Tensor
    order: Tensor

    @property
    def mask(self) -> Tensor:
        """Whether each slot is selected: bool [B, H, G, Q, T]."""
        return self.order >= self.lowest

    @property
    def lowest(self) -> Tensor:
        """The integer of `rank_keys` that the selected keys reach: int64 [B, H, G, Q, 1], above INVALID."""
        return self.order.gather(-1, self.slots).amin(-1, keepdim=True).clamp(min=INVALID + 1)

    @property
    def count(self) -> Tensor:
        """Number of selected tokens of each query: int64 [B, H, G, Q]."""
        return self.taken.sum(-1)


def valid_keys(q_len: int, kv_len: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Mark the keys that each query may attend to: real tokens up to its own slot, T - Q + i for query i.

    Args:
        q_len: Q.
        kv_len: T.
        key_mask: bool [B, T], True: a real token; None: all tokens are real.
        device: device of the result.

    Returns:
        bool [B or 1, 1, 1, Q, T].
    """
    last = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    causal = (torch.arange(kv_len, device=device) <= last)[None, None, None]
    return causal if key_mask is None else causal & key_mask[:, None, None, None]


SAMPLE_FIRST, SAMPLE_LAST, SAMPLE_STRIDE = 4, 64, 32
"""The sample of a query's valid keys: the first 4, the last 64, and every 32nd from the first on."""


class Marks(NamedTuple):
    """Forced and sampled keys, the same for every layer of a forward; None if a call needs none.

    Attributes:
        forced: bool [B or 1, 1, 1, Q, T], or [B, Hkv, 1, Q, T] if heads have budgets of their own: the ``n_sink`` first
            and ``n_recent`` last valid keys of each query, which are always selected.
        sample: int64 [B or 1, 1, 1, Q, S], slots of the sampled valid keys (`SAMPLE_FIRST`), whose mass normalises the
            attention weights; -1: none.
        bytes: uint8 [B or 1, 1, 1, 1, N], of one query: 1 for a valid key, 3 for a forced one, 0 for others and behind
            T; N is T, rounded up to a multiple of 16, so that kernels read several at once. None: not computed.
    """

    forced: Tensor | None
    sample: Tensor | None
    bytes: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor, budget: Budget, samples: bool, counted: Callable[[], Tensor] | None = None) -> Marks:
        """Compute the marks of valid keys, bool [B or 1, 1, 1, Q, T]; padding between keys does not count.

        ``counted`` returns the `running_count` of ``valid``, if marks depend on it; None: computed here.
        """
        forces = budget.n_sink != 0 or budget.n_recent != 0
        forced = sample = None
        if forces or samples:
            number = running_count(valid) if counted is None else counted()
            sample = _sample(number) if samples else None
            if forces:
                first, last = budget.forced(budget.n_fac if budget.is_count else budget.of(number[..., -1])[..., None])
                forced = valid & ((number <= first) | (number > number[..., -1:] - last))
        return cls(forced, sample, _as_bytes(valid, forced) if valid.shape[3] == 1 and budget.heads == 1 else None)

    def with_room(self, kv_len: int, free: int) -> Marks:
        """Pad the marks of ``kv_len`` keys for a buffer with ``free`` invalid slots behind them."""
        more = _strides(kv_len + free) - _strides(kv_len)
        forced = None if self.forced is None else F.pad(self.forced, (0, free))
        return Marks(forced, None if self.sample is None else F.pad(self.sample, (0, more), value=-1))


_LONG, _PIECE = 16384, 512
"""The longest row that a GPU counts at once, and keys of a piece of a longer one."""


def running_count(valid: Tensor) -> Tensor:
    """Count the valid keys up to and including each slot.

    Args:
        valid: bool [.., T].

    Returns:
        int64 [.., T], contiguous.
    """
    # cumsum on a GPU scans a row by one multiprocessor: 205 us for 131072 keys (H200)
    if valid.is_cuda and valid.shape[-1] > _LONG and not torch.compiler.is_compiling():
        return _count_by_pieces(valid)
    return valid.cumsum(-1)


def _count_by_pieces(valid: Tensor) -> Tensor:
    """Compute `running_count` of pieces of a row, then add what is before each."""
    kv_len = valid.shape[-1]
    within = F.pad(valid, (0, -kv_len % _PIECE)).unflatten(-1, (-1, _PIECE)).cumsum(-1)
    total = within[..., -1]
    number: Tensor = within + (total.cumsum(-1) - total)[..., None]
    return number.flatten(-2)[..., :kv_len].contiguous()


def _as_bytes(valid: Tensor, forced: Tensor | None) -> Tensor:
    """Compute `Marks.bytes`."""
    marks = flags(valid) if forced is None else torch.add(flags(valid), flags(forced), alpha=2)
    return F.pad(marks, (0, -marks.shape[-1] % 16))


def flags(marked: Tensor) -> Tensor:
    """A bool tensor as uint8, in the same memory; compiled code converts it, since torch 2.11 compiles no such view."""
    return marked.to(torch.uint8) if torch.compiler.is_compiling() else marked.view(torch.uint8)


def _strides(kv_len: int) -> int:
    """Number of slots that the stride samples behind the first one."""
    return (kv_len - 1) // SAMPLE_STRIDE


def _sample(number: Tensor) -> Tensor:
    """Compute `Marks.sample` from the number of valid keys up to and including each slot."""
    count, kv_len = number[..., -1:], number.shape[-1]
    first = torch.arange(1, SAMPLE_FIRST + 1, device=number.device).expand(*number.shape[:-1], -1)
    strided = SAMPLE_STRIDE * torch.arange(1, _strides(kv_len) + 1, device=number.device) + 1
    last = count - torch.arange(SAMPLE_LAST, device=number.device)
    again = (last <= SAMPLE_FIRST) | ((last - 1) % SAMPLE_STRIDE == 0)
    wanted = torch.cat([first, strided.expand(*number.shape[:-1], -1), torch.where(again, 0, last)], dim=-1)
    slots = torch.searchsorted(number, wanted)
    return torch.where((wanted > 0) & (wanted <= count), slots, -1)


def forced_keys(valid: Tensor, budget: Budget) -> Tensor | None:
    """Compute `Marks.forced` alone."""
    return Marks.of(valid, budget, samples=False).forced


def select(scores: Tensor, valid: Tensor, budget: Budget, forced: Tensor | None = None) -> Selection:
    """Select the best valid keys of every query, as many as the budget allows; ties go to the lower slot.

    The forced tokens, ``n_sink`` first and ``n_recent`` last valid keys, take their places in the budget first. Shapes
    depend on the budget and T alone, so the function compiles without graph breaks.

    Args:
        scores: float [B, H, G, Q, T], ranked as float32.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        budget: number of keys that each query attends to.
        forced: `Marks.forced`; None: computed here.
    """
    if forced is None:
        forced = forced_keys(valid, budget)
    order = torch.where(valid, rank_keys(scores, first=forced), INVALID)
    varies = not isinstance(budget.n_fac, int)  # rows or heads keep different numbers of the best keys
    best = largest(order, budget.widest(scores.shape[-1]))
    taken = best > INVALID
    if varies:
        best = best.sort(-1, descending=True).values
        taken = torch.arange(best.shape[-1], device=scores.device) < budget.of(valid.sum(-1))[..., None]
        taken = taken.expand(best.shape)
    best = torch.where(taken, best, best.amax(-1, keepdim=True))
    return Selection(slot_of(best, scores.shape[-1]), taken, order)
