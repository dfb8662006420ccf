"""Agreement and variance in the profile of a real model: the chunks that only one of them chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from evals.quality.committed import markdown
from fasa_flex import FasaProfile

SHARES = {"a quarter": 4, "half": 2}


def chosen(table: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of each head's chunks."""
    return torch.zeros_like(table, dtype=torch.bool).scatter_(-1, table.topk(count, -1).indices, True)


def slow(mask: Tensor) -> str:
    """Share of the marked chunks in the slower half of the frequencies."""
    return f"{float(mask[..., mask.shape[-1] // 2 :].sum() / mask.sum()):.0%}"


def criteria(profile: FasaProfile) -> str:
    """For a quarter and half of the chunks: how many both choose, what the others are, and the variance of each choice.

    Means over the heads of all calibrated layers but the first, which is dense by default.
    """
    assert profile.variance is not None
    calibrated = profile.variance.sum((-1, -2)) > 0
    calibrated[0] = False
    agreement, variance = profile.agreement[calibrated], profile.variance[calibrated]
    whole, lines = variance.sum(-1), []
    for name, part in SHARES.items():
        ours = {key: chosen(table, table.shape[-1] // part) for key, table in (("a", agreement), ("v", variance))}
        both = ours["a"] & ours["v"]
        held = {key: float((variance * mask).sum(-1).div(whole).mean()) for key, mask in ours.items()}
        common = float(both.sum() / ours["a"].sum())
        only = (slow(mask & ~both) for mask in ours.values())
        lines.append([name, f"{common:.0%}", *only, *(f"{share:.0%}" for share in held.values())])
    head = [
        "chunks",
        "in common",
        "of agreement's other chunks, slower half",
        "of variance's other chunks, slower half",
    ]
    return markdown([*head, "variance held by agreement's", "by variance's"], lines)
