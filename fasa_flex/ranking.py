"""One total order on scores, so that every device and backend ranks alike.

A score and its slot are packed into one int64: the score's float32 bits, mapped so that integer order is float order,
above the complement of the slot. No two keys are equal, so any `topk` is exact and ties go to the lower slot. An int64
`topk` on CPU costs no more than a float one, where a stable sort costs 20-40 times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

INVALID = torch.iinfo(torch.int64).min
"""Below every score: the key may not be selected."""

_FIRST = 0x7FFFFFFF
_NAN = 0x7FC00000


def rank_keys(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """Order-preserving integers for scores along the last dimension.

    Args:
        scores: float [..., T], T < 2**32; ranked as float32.
        first: bool, broadcast to ``scores``: slots that rank above all others, whatever their score.

    Returns:
        int64 [..., T], all distinct along T: a higher score is larger, among equal scores the lower slot is larger.
        -0.0 equals 0.0, and NaN ranks above +inf: it is selected and shows in the result instead of hiding.
    """
    scores = scores.float()
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = torch.where(scores != scores, _NAN, ordered)  # isnan, which Inductor's CPU code takes one by one
    if first is not None:
        ordered = torch.where(first, _FIRST, ordered)
    last_first = scores.shape[-1] - 1 - torch.arange(scores.shape[-1], device=scores.device)
    return (ordered.long() << 32) | last_first


def slot_of(order: Tensor, kv_len: int) -> Tensor:
    """The slots that `rank_keys` packed into its integers, int64; of INVALID: the last one."""
    return kv_len - 1 - (order & 0xFFFFFFFF)
