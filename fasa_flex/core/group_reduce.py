"""One ranking of the keys per GQA group from the scores of its query heads, and the heads' attention weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.compiler import operator
from fasa_flex.core.config import GroupReduce
from fasa_flex.core.ranking import in_tiles
from fasa_flex.core.softmax import Softmax


def reduce_group(
    scores: Tensor, valid: Tensor, how: GroupReduce, softmax: Softmax, sample: Tensor | None = None
) -> Tensor:
    """Reduce the scores of a group's query heads to one ranking per key/value head.

    Args:
        scores: float32 [B, Hkv, G, Q, T], dot products.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        how: ``"softmax"``: the log of the sum of the heads' attention weights, each head's normalised over sampled keys
            alone (`weigh`), so that one pass over the keys ranks them; ``"softmax_exact"``: the sum of the weights,
            normalised over all valid keys; ``"max"`` or ``"mean"`` of the scores; ``"none"``: no reduction.
        softmax: scaling and logit cap, which turn scores into logits.
        sample: `Marks.sample`, required for ``"softmax"``.

    Returns:
        float32 [B, Hkv, 1, Q, T], for ``"none"`` the scores unchanged; entries of invalid keys have no meaning.
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
    if torch.compiler.is_compiling() and scores.device.type == "cpu":  # head by head: a row stays in the CPU's cache
        softmaxes = (torch.where(valid, member, -torch.inf).softmax(-1) for member in logits.split(1, dim=2))
        return functools.reduce(torch.add, softmaxes)
    return attention_weights(torch.where(valid, logits, -torch.inf)).sum(2, keepdim=True)


MOST = 80.0
"""Upper limit of a weight's logarithm, relative to the sample's mass: sums of float32 do not overflow."""


class Weights(NamedTuple):
    """Attention weights of a group, divided by the mass of sampled keys: they need no earlier pass over all keys.

    Attributes:
        ranking: float32 [B, Hkv, 1, Q, T], the log of the sum of the weights over the group's query heads.
        total: float32 [B, Hkv, G, Q], the sum of each head's weights over the valid keys.
        unit: float32 [B, Hkv, G, Q, 1], the log of the sample's mass.
    """

    ranking: Tensor
    total: Tensor
    unit: Tensor


def weigh(logits: Tensor, valid: Tensor, sample: Tensor) -> Weights:
    """Compute the attention weights of all keys in one pass over them.

    Args:
        logits: float32 [B, Hkv, G, Q, T].
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        sample: `Marks.sample`, the slots of the sampled keys.
    """
    slots = sample.clamp(min=0).expand(*logits.shape[:-1], -1)
    sampled = torch.where(sample < 0, -torch.inf, logits.gather(-1, slots))
    compiled = torch.compiler.is_compiling()
    if compiled and logits.device.type != "cpu":  # by tile: in many programs, not one for each head
        sampled = in_tiles(sampled, -torch.inf).logsumexp(-1)
    unit = sampled.logsumexp(-1, keepdim=True)
    unit = torch.where(unit == -torch.inf, 0.0, unit)
    if compiled:  # head by head: the compiler fuses this into one loop over the keys
        members = list(map(torch.sub, logits.unbind(2), unit.unbind(2)))
        best = functools.reduce(torch.maximum, members)
        best = torch.where(best == -torch.inf, 0.0, best)
        near = [(member - best).exp() for member in members]
        factor = best.clamp(max=MOST).exp()
        masses = [torch.where(valid[:, :, 0], member * factor, 0.0) for member in near]
        if logits.device.type == "cpu":
            total = torch.stack([mass.sum(-1) for mass in masses], dim=2)
        else:  # by tile, as `largest` finds maxima: one kernel computes both where it reads the logits
            total = torch.stack([in_tiles(mass).sum(-1) for mass in masses], dim=2).sum(-1)
    else:  # all heads at once: fewer eager calls
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
    """Softmax along the last dimension by torch's kernel: Inductor's computes each exponential twice (torch 2.13)."""
    return logits.softmax(-1)
