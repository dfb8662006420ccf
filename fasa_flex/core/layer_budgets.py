"""Distribution of a mean budget over layers and key/value heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import floor, inf
from typing import Any, Literal

import numpy as np

from fasa_flex.core.budget import Budget

Weight = float | tuple[float, ...]
"""Weight of one layer, or of each of its key/value heads."""

LayerBudgets = Literal["uniform", "pyramid"] | tuple[Weight, ...]

_MOST_UNEVEN = 1e12
"""Largest allowed ratio of two weights."""

_PYRAMID = 20
"""Ratio of the mean budget to the budget of the last layer: beta of PyramidKV."""


def check_layer_budgets(value: object) -> LayerBudgets:
    """Check ``FasaConfig.layer_budgets`` and convert its sequences to tuples.

    Raises:
        ValueError: ``value`` is neither the name of a rule nor a sequence of positive weights.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value in ("uniform", "pyramid"):
        return value
    if isinstance(value, list | tuple) and value:
        weights = tuple(tuple(weight) if isinstance(weight, list | tuple) else weight for weight in value)
        flat = [w for weight in weights for w in (weight if isinstance(weight, tuple) else (weight,))]
        numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < inf for w in flat)
        if numbers and max(flat) <= _MOST_UNEVEN * min(flat) and sum(flat) < inf:
            return weights
    raise ValueError(
        f"layer_budgets must be 'uniform', 'pyramid' or positive weights (no {_MOST_UNEVEN:g} to 1), got {value!r}; "
        "give one for every layer, or a sequence of one for each of its key/value heads."
    )


def spread_budget(
    budget: Budget, how: LayerBudgets, layers: Sequence[int], kv_heads: int, shard: tuple[int, int] = (0, 1)
) -> dict[int, Budget]:
    """Spread a mean budget over the sparse layers, or over their key/value heads.

    Every layer or head gets its forced tokens, and a part of the other tokens in proportion to its weight; at least one
    token in all. Counts are rounded so that their sum is exact.

    Args:
        budget: the mean budget, a count or a share.
        how: ``"uniform"``; ``"pyramid"``: falls linearly with depth, in the last layer to a twentieth of the mean
            (PyramidKV, Cai et al., 2024; the paper's Table 4); or one weight for every layer of the model, of which
            those of dense layers are ignored.
        layers: numbers of the sparse layers, ascending.
        kv_heads: key/value heads per layer, over all ranks.
        shard: `Budget.shard` of heads with budgets of their own.

    Returns:
        the budget of each layer, by its number.

    Raises:
        ValueError: the weights do not fit the model, heads have weights although the budget is a share, or the share of
            a layer exceeds 1.
    """
    if how == "uniform" or not layers:
        return dict.fromkeys(layers, budget)
    weights = _pyramid(len(layers)) if how == "pyramid" else _of_layers(how, layers, kv_heads)
    by_head = any(isinstance(weight, tuple) for weight in weights)
    if isinstance(budget.n_fac, float):
        if by_head:
            raise ValueError(f"heads cannot have weights of a share, n_fac = {budget.n_fac}; count tokens instead.")
        unit = budget.n_fac * len(weights) / sum(weights)
        if unit * max(weights) > 1 + 1e-9:
            raise ValueError(
                f"layer_budgets gives a layer {unit * max(weights):.3g} of its keys, n_fac = {budget.n_fac} being the "
                "mean; lower n_fac or weigh layers more evenly."
            )
        shares = [min(1.0, unit * weight) for weight in weights]
        return {layer: replace(budget, n_fac=share) for layer, share in zip(layers, shares, strict=True)}
    assert isinstance(budget.n_fac, int)
    heads = kv_heads if by_head else 1
    flat = [w for weight in weights for w in (weight if isinstance(weight, tuple) else (weight,) * heads)]
    forced = (budget.n_sink or 0) + (budget.n_recent or 0)
    amounts = _in_proportion((budget.n_fac - forced) * len(flat), flat, least=0 if forced else 1)
    ends = [floor(amount + 0.5) for amount in accumulate(amounts, initial=0)]
    counts = [forced + end - start for start, end in pairwise(ends)]
    rows = [tuple(counts[at : at + heads]) for at in range(0, len(counts), heads)]
    shard = shard if by_head else budget.shard
    counts_of = {layer: row if by_head else row[0] for layer, row in zip(layers, rows, strict=True)}
    return {layer: replace(budget, n_fac=own, shard=shard) for layer, own in counts_of.items()}


def _in_proportion(total: int, weights: Sequence[float], least: int) -> list[float]:
    """Divide ``total`` in proportion to the weights, with at least ``least`` for each weight."""
    lifted: set[int] = set()
    while True:
        others = [number for number in range(len(weights)) if number not in lifted]
        unit = (total - least * len(lifted)) / sum(weights[number] for number in others)
        low = {number for number in others if unit * weights[number] < least * (1 - 1e-9)}
        if not low:
            return [least if number in lifted else max(least, unit * w) for number, w in enumerate(weights)]
        lifted |= low


def _pyramid(layers: int) -> list[Any]:
    last = 1 / _PYRAMID
    return [2 - last - 2 * (1 - last) * layer / max(1, layers - 1) for layer in range(layers)]


def _of_layers(by_layer: Sequence[Weight], layers: Sequence[int], kv_heads: int) -> list[Any]:
    if len(by_layer) <= layers[-1]:
        raise ValueError(
            f"layer_budgets weighs {len(by_layer)} layers and layer {layers[-1]} is sparse; "
            "give a weight for every layer of the model."
        )
    weights = [by_layer[layer] for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        if isinstance(weight, tuple) and len(weight) != kv_heads:
            raise ValueError(
                f"layer_budgets weighs {len(weight)} heads in layer {layer}, it has {kv_heads}; give as many."
            )
    return weights
