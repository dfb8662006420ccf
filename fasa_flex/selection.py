"""Which keys each query attends to: validity, budget, forced tokens, top-k (the paper's T_t)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.budget import Budget
from fasa_flex.ranking import INVALID, rank_keys


@dataclass(frozen=True)
class Selection:
    """The selected slots of every query; H is Hkv, and G is 1 where a GQA group shares its selection.

    Attributes:
        slots: int64 [B, H, G, Q, K], best first; entries at and beyond ``count`` repeat the best slot.
        count: int64 [B or 1, 1, 1, Q], selected tokens of each query: min(budget, valid keys).
        mask: bool [B, H, G, Q, T], the same sets by slot.
    """

    slots: Tensor
    count: Tensor
    mask: Tensor

    @property
    def taken(self) -> Tensor:
        """Which entries of ``slots`` count: bool [B or 1, 1, 1, Q, K]."""
        return torch.arange(self.slots.shape[-1], device=self.slots.device) < self.count[..., None]


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


def select(scores: Tensor, valid: Tensor, budget: Budget) -> Selection:
    """The budget's worth of best valid keys for every query, ties to the lower slot.

    Forced tokens come first: the ``n_sink`` first and ``n_recent`` last valid keys of the query, inside the budget.
    Shapes depend on the budget and T alone, so the function compiles without graph breaks.

    Args:
        scores: float [B, H, G, Q, T], ranked as float32.
        valid: bool [B or 1, 1, 1, Q, T].
        budget: of every query.
    """
    n_valid = valid.sum(-1)
    forced = None
    if budget.n_sink or budget.n_recent:
        nth = valid.cumsum(-1)
        forced = (nth <= budget.n_sink) | (nth > n_valid[..., None] - budget.n_recent)
    order = torch.where(valid, rank_keys(scores, first=forced), INVALID)
    best = order.topk(budget.widest(scores.shape[-1]), dim=-1)
    count = budget.of(n_valid)
    last = (count - 1).clamp(min=0)[..., None].expand(*best.values.shape[:-1], 1)
    mask = (order >= best.values.gather(-1, last)) & valid
    taken = torch.arange(best.indices.shape[-1], device=scores.device) < count[..., None]
    return Selection(torch.where(taken, best.indices, best.indices[..., :1]), count, mask)
