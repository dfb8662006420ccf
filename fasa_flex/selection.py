"""Which keys each query attends to: validity, budget, forced tokens, top-k (the paper's T_t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def budget(n_fac: int | float, n_valid: Tensor) -> Tensor:
    """Tokens that queries with ``n_valid`` keys attend to: min(n_fac, n_valid), a share rounded up."""
    if isinstance(n_fac, int):
        return n_valid.clamp(max=n_fac)
    allowed: Tensor = _share_of(n_valid, n_fac)
    return allowed


def widest_budget(n_fac: int | float, kv_len: int) -> int:
    """The largest `budget` over ``kv_len`` keys: the static width of `Selection.slots`."""
    if isinstance(n_fac, int):
        return min(n_fac, kv_len)
    widest: int = _share_of(kv_len, n_fac)
    return widest


def _share_of(keys: Any, share: float) -> Any:
    """``share`` of ``keys`` (int or int64 tensor) rounded up, in integers.

    The share is taken a trillionth lower, so that it means the number that was written: 7 % of 100 keys are 7, although
    0.07 * 100 exceeds 7 in binary.
    """
    trillionths = max(round(share * 10**12) - 1, 1)
    return -(-keys * trillionths // 10**12)


def select(scores: Tensor, valid: Tensor, n_fac: int | float, n_sink: int = 0, n_recent: int = 0) -> Selection:
    """The budget's worth of best valid keys for every query, ties to the lower slot.

    Forced tokens come first: the ``n_sink`` first and ``n_recent`` last valid keys of the query, inside the budget.
    Shapes depend on ``n_fac`` and T alone, so the function compiles without graph breaks.

    Args:
        scores: float [B, H, G, Q, T], ranked as float32.
        valid: bool [B or 1, 1, 1, Q, T].
        n_fac: tokens (int) or share of the valid keys (float).
    """
    n_valid = valid.sum(-1)
    forced = None
    if n_sink or n_recent:
        nth = valid.cumsum(-1)
        forced = (nth <= n_sink) | (nth > n_valid[..., None] - n_recent)
    order = torch.where(valid, rank_keys(scores, first=forced), INVALID)
    best = order.topk(widest_budget(n_fac, scores.shape[-1]), dim=-1)
    count = budget(n_fac, n_valid)
    last = (count - 1).clamp(min=0)[..., None].expand(*best.values.shape[:-1], 1)
    mask = (order >= best.values.gather(-1, last)) & valid
    taken = torch.arange(best.indices.shape[-1], device=scores.device) < count[..., None]
    return Selection(torch.where(taken, best.indices, best.indices[..., :1]), count, mask)
