"""Expected speed-ups from counted bytes: limits, Amdahl ceilings and crossovers; arithmetic without tensors.

A decode step reads its keys and values once and computes little with them, so its time is proportional to bytes. FASA
reads the packed dominant dimensions of every key, then the selected rows (the paper's FASA-C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reads:
    """Bytes that one attention call must read.

    Attributes:
        dense: bytes of all keys and values.
        sparse: bytes of packed keys, of the selected rows of keys and values, and of the completion's state.
    """

    dense: int
    sparse: int

    @property
    def limit(self) -> float:
        """The largest speed-up by fewer bytes: ``1 / (n_tip / d + n_fac / t)`` if all dtypes are equal."""
        return self.dense / self.sparse


def attention_reads(
    context: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    n_tip: int,
    n_fac: int,
    itemsize: int,
    packed_token_bytes: float | None = None,
    state_bytes: int = 0,
) -> Reads:
    """Bytes of one decode query for each of ``batch`` rows in one layer.

    Args:
        context: keys of a row.
        n_tip: dominant chunks of a head.
        n_fac: tokens a query attends to.
        itemsize: bytes of a number in the cache.
        packed_token_bytes: bytes of one token's packed key in one head, scales included; None: the cache's dtype.
        state_bytes: bytes of the completion's state that a sparse call reads, in all rows and heads.
    """
    token = 2 * n_tip * itemsize if packed_token_bytes is None else packed_token_bytes
    taken = min(n_fac, context)
    row = 2 * head_dim * itemsize
    dense = batch * kv_heads * context * row
    if taken == context:
        return Reads(dense, dense)
    return Reads(dense, round(batch * kv_heads * (context * token + taken * row)) + state_bytes)


def amdahl(step: float, attention: float, limit: float, sparse_share: float = 1.0) -> float:
    """The largest speed-up of a whole step when its attention runs at the byte limit and nothing else changes.

    Args:
        step: time of the dense step.
        attention: time of dense attention in it, over all layers, in the unit of ``step``.
        limit: largest speed-up of attention (`Reads.limit`).
        sparse_share: share of the layers whose attention is sparse.
    """
    attention = min(attention, step)
    sparse = attention * sparse_share
    return step / (step - sparse + sparse / limit)


def project(
    step: float, dense: float, head: float, batch: int, layers: tuple[int, int], sparse: bool
) -> dict[str, float] | None:
    """Project the step of a cut model to all layers; None if no layer was cut.

    Args:
        step: seconds of the step.
        dense: seconds of the dense step of as many layers.
        head: seconds outside of layers, in both steps.
        batch: rows.
        layers: number of measured layers, and of the whole model's.
        sparse: whether the step is sparse; the whole model's layer 0 is then dense, as in `FasaConfig`.
    """
    measured, full = layers
    if measured == full:
        return None
    layer, dense_layer = ((time - head) / measured for time in (step, dense))
    seconds = head + (full - sparse) * layer + sparse * dense_layer
    return {"seconds": seconds, "tokens_per_s": batch / seconds, "speedup": (head + full * dense_layer) / seconds}


@dataclass(frozen=True)
class Crossover:
    """The context from which sparse attention is faster than dense attention.

    Attributes:
        context: tokens; None if it lies outside of the measured contexts.
        how: "interpolated", "below the smallest context measured (...)" or "above the largest context measured (...)".
    """

    context: int | None
    how: str


def crossover(speedups: Sequence[tuple[int, float]]) -> Crossover:
    """The smallest context from which on all speed-ups exceed 1, interpolated in logarithms of both.

    Args:
        speedups: pairs (context, dense time / sparse time) of one method, at least one.
    """
    points = sorted(speedups)
    lost = [index for index, (_, ratio) in enumerate(points) if ratio <= 1]
    if not lost:
        return Crossover(None, f"below the smallest context measured ({points[0][0]})")
    if lost[-1] == len(points) - 1:
        return Crossover(None, f"above the largest context measured ({points[-1][0]})")
    (low, below), (high, above) = points[lost[-1]], points[lost[-1] + 1]
    along = -math.log(below) / (math.log(above) - math.log(below))
    return Crossover(round(math.exp(math.log(low) + along * (math.log(high) - math.log(low)))), "interpolated")
