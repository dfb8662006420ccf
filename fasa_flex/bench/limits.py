"""What to expect from counting bytes: limits, ceilings and crossovers. Plain arithmetic, no tensors.

A decode step reads its keys and values once and computes little with them, so time follows bytes. FASA reads the packed
dominant dimensions of every key, then the selected rows (the paper's FASA-C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reads:
    """What one attention call must read, in bytes.

    Attributes:
        dense: all keys and values.
        sparse: packed keys, the selected rows of keys and values, and what completes them.
    """

    dense: int
    sparse: int

    @property
    def limit(self) -> float:
        """The largest speed-up that fewer bytes allow: ``1 / (n_tip / d + n_fac / t)`` where dtypes are equal."""
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
        n_tip: dominant chunks a head scores with.
        n_fac: tokens a query attends to.
        itemsize: bytes of a number in the cache.
        packed_token_bytes: bytes of one token's packed key in one head, scales included; None: the cache's dtype.
        state_bytes: what a sparse call reads of the completion's state, in all rows and heads.
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
        attention: time that dense attention takes in it, all layers.
        limit: of attention alone.
        sparse_share: share of the layers whose attention is sparse.
    """
    attention = min(attention, step)
    sparse = attention * sparse_share
    return step / (step - sparse + sparse / limit)


def project(
    step: float, dense: float, head: float, batch: int, layers: tuple[int, int], sparse: bool
) -> dict[str, float] | None:
    """A step at full depth, from that of the first layers; None where these are all.

    Args:
        step: time of the step.
        dense: time of the dense one with as many layers.
        head: time of what is no layer in both.
        batch: rows.
        layers: as measured, and of the whole model.
        sparse: whether its attention is; layer 0 is then dense at full depth, as in `FasaConfig`.
    """
    measured, full = layers
    if measured == full:
        return None
    layer, dense_layer = ((time - head) / measured for time in (step, dense))
    seconds = head + (full - sparse) * layer + sparse * dense_layer
    return {"seconds": seconds, "tokens_per_s": batch / seconds, "speedup": (head + full * dense_layer) / seconds}


@dataclass(frozen=True)
class Crossover:
    """Where sparse begins to beat dense.

    Attributes:
        context: tokens, or None where no measured context shows it.
        how: "interpolated", "below the smallest context measured" or "above the largest context measured".
    """

    context: int | None
    how: str


def crossover(speedups: Sequence[tuple[int, float]]) -> Crossover:
    """The smallest context from which on speed-ups are above 1, interpolated in logarithms of both.

    Args:
        speedups: (context, dense time / sparse time) pairs of one method; at least one.
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
