"""A prefill by blocks in plain loops and float64: which tokens each query attends to, and the attention to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128


def chosen(mass: list[float], diagonal: int, share: float, needed: float | None = None) -> set[int]:
    """Blocks of keys of one block of queries: the first, its own, the one before, then by mass; lower ones first."""
    most = max(3, math.ceil(share * (diagonal + 1)))
    taken = {0, diagonal, max(0, diagonal - 1)}
    order = sorted(range(diagonal), key=lambda block: (block not in taken, -mass[block], block))
    whole, held, count = sum(mass[: diagonal + 1]), mass[diagonal], 1
    picked = {diagonal}
    for block in order[: most - 1]:
        if needed is not None and held >= needed * whole and block not in taken:
            break
        picked.add(block)
        held, count = held + mass[block], count + 1
    return picked


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: set[int],
    token: int,
    slots: list[int],
    scaling: float,
    softcap: float | None = None,
    sink: float | None = None,
    completes: bool = False,
) -> Tensor:
    """One query [D] of token number ``token`` over keys and values [T, D] whose tokens are in ``slots``.

    If it ``completes``, each block that is left out gives 128 times its mean key and value.
    """
    seen = [slots[n] for n in range(token + 1) if n // BLOCK in blocks]
    keys, values, times = k[seen].double(), v[seen].double(), torch.ones(len(seen), dtype=torch.float64)
    for block in set(range(token // BLOCK)) - blocks if completes else ():
        own = slots[block * BLOCK : (block + 1) * BLOCK]
        keys = torch.cat([keys, k[own].double().mean(0, keepdim=True)])
        values = torch.cat([values, v[own].double().mean(0, keepdim=True)])
        times = torch.cat([times, torch.tensor([BLOCK], dtype=torch.float64)])
    logits = keys @ q.double() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + times.log()
    if sink is not None:
        logits = torch.cat([logits, torch.tensor([sink], dtype=torch.float64)])
    return logits.softmax(-1)[: len(values)] @ values
