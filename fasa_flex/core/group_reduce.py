"""How the query heads of a group rank the keys as one, and what the keys weigh."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.compiler import operator
from fasa_flex.core.config import GroupReduce
from fasa_flex.core.softmax import Softmax


def reduce_group(
    scores: Tensor, valid: Tensor, how: GroupReduce, softmax: Softmax, sample: Tensor | None = None
) -> Tensor:
    """One ranking per key/value head from those of its query heads.

    Args:
        scores: float32 [B, Hkv, G, Q, T].
        valid: bool [B or 1, 1, 1, Q, T].
        how: ``"softmax"``: the log of the sum of the heads' attention weights, those of each head relative to the mass
            of sampled keys alone (`weigh`), so that one pass over the keys ranks them; ``"softmax_exact"``: the sum,
            relative to the mass of all valid keys; ``"max"``; ``"mean"``; or ``"none"``.
        softmax: the model's, whose scaling and cap make logits of scores.
        sample: `Marks.sample`, for ``"softmax"``.

    Returns:
        float32 [B, Hkv, 1, Q, T], or the scores as they are for ``"none"``; what it says of invalid keys is not read.
    """
    if how == "none" or scores.shape[2] == 1:
        return scores
    if how == "max":
        return scores.amax(2, keepdim=True)
    if how == "mean":
        return scores.mean(2, keepdim=True)
    logits = softmax.logits(scores)
    if how == "softmax":
        assert sample is not None
        return weigh(logits, valid, sample).ranking
    if torch.compiler.is_compiling() and scores.device.type == "cpu":  # head by head, so that a row stays in the cache
        softmaxes = (torch.where(valid, member, -torch.inf).softmax(-1) for member in logits.split(1, dim=2))
        return functools.reduce(torch.add, softmaxes)
    return attention_weights(torch.where(valid, logits, -torch.inf)).sum(2, keepdim=True)


MOST = 80.0
"""The log of the largest weight relative to the sample's mass, so that sums of float32 do not overflow."""


class Weights(NamedTuple):
    """Attention weights of a group relative to the mass of sampled keys, so that nothing is asked of all keys first.

    Attributes:
        ranking: the log of the group's sum of weights, float32 [B, Hkv, 1, Q, T].
        total: the sum over valid keys of each head's weights, float32 [B, Hkv, G, Q].
        unit: the log of the sample's mass, float32 [B, Hkv, G, Q, 1].
    """

    ranking: Tensor
    total: Tensor
    unit: Tensor

    def of(self, logits: Tensor) -> Tensor:
        """Weights, at most e^80, of logits [B, Hkv, G, Q, K]."""
        return (logits - self.unit).clamp(max=MOST).exp()


def weigh(logits: Tensor, valid: Tensor, sample: Tensor) -> Weights:
    """Weigh all keys in one pass over them.

    Args:
        logits: float32 [B, Hkv, G, Q, T].
        valid: bool [B or 1, 1, 1, Q, T].
        sample: `Marks.sample`.
    """
    slots = sample.clamp(min=0).expand(*logits.shape[:-1], -1)
    unit = torch.where(sample < 0, -torch.inf, logits.gather(-1, slots)).logsumexp(-1, keepdim=True)
    unit = torch.where(unit == -torch.inf, 0.0, unit)
    if torch.compiler.is_compiling():  # member by member, which a compiler makes one loop over the keys of
        members = list(map(torch.sub, logits.unbind(2), unit.unbind(2)))
        best = functools.reduce(torch.maximum, members)
        best = torch.where(best == -torch.inf, 0.0, best)
        near = [(member - best).exp() for member in members]
        factor = best.clamp(max=MOST).exp()
        total = torch.stack([torch.where(valid[:, :, 0], member * factor, 0.0).sum(-1) for member in near], dim=2)
    else:  # at once, in fewer calls
        weighed = logits - unit
        best = weighed.amax(2)
        best = torch.where(best == -torch.inf, 0.0, best)
        each = (weighed - best[:, :, None]).exp()
        near = list(each.unbind(2))
        factor = best.clamp(max=MOST).exp()
        total = torch.where(valid, each * factor[:, :, None], 0.0).sum(-1)
    ranking = best + functools.reduce(torch.add, near).log()
    return Weights(ranking[:, :, None], total, unit)


@operator("attention_weights", torch.empty_like)
def attention_weights(logits: Tensor) -> Tensor:
    """Softmax along the last dimension, as torch has it: Inductor's own takes every exponential twice (torch 2.13)."""
    return logits.softmax(-1)
