"""An independent oracle of the method, written from the paper's definitions: float64 numpy, plain loops, row by row.

Nothing here is imported from `fasa_flex`, and nothing here is fast. Shapes: q [B, Hq, Q, D], k and v [B, Hkv, T, D],
all post-RoPE; query i of Q sits at absolute slot T - Q + i; query head h belongs to key/value head h // (Hq // Hkv).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pairs = Iterable[Sequence[int]]


def score(q: Array, k: Array, pairs: Pairs) -> Array:
    """Sum over chunks of q^[i] . k^[i] for one query [D] against the keys [T, D] -> [T]."""
    total = np.zeros(len(k))
    for a, b in pairs:
        total += q[a] * k[:, a] + q[b] * k[:, b]
    return total


def top(scores: Array, among: Iterable[int], count: int) -> list[int]:
    """The `count` best of `among`, best first; equal scores go to the lower index."""
    return sorted(among, key=lambda j: (-scores[j], j))[:count]


def budget(n_fac: float, n_valid: int) -> int:
    """How many keys one query may read: an int counts tokens, a float is a share of the valid keys, at least one.

    The share is the decimal number that was written: 7 % of 100 keys are 7, whatever 0.07 * 100 is in binary.
    """
    wanted = n_fac if isinstance(n_fac, int) else max(1, math.ceil(Fraction(repr(n_fac)) * n_valid))
    return min(wanted, n_valid)


def valid_keys(slot: int, key_mask: Sequence[bool] | None, window: int | None = None) -> list[int]:
    """The keys that may compete for the query at `slot`: causal, not padding, among the last `window` slots."""
    first = 0 if window is None else max(0, slot + 1 - window)
    return [j for j in range(first, slot + 1) if key_mask is None or key_mask[j]]


def select(scores: Array, valid: Sequence[int], n_fac: float, n_sink: int = 0, n_recent: int = 0) -> list[int]:
    """The selected keys, ascending: the first valid ones and the last valid ones are forced in, inside the budget.

    Where a share of few keys is fewer than the forced ones, the first of them are in.
    """
    size = budget(n_fac, len(valid))
    if size >= len(valid):
        return sorted(valid)
    forced = list(dict.fromkeys([*valid[:n_sink], *valid[max(0, len(valid) - n_recent) :]]))[:size]
    return sorted(forced + top(scores, [j for j in valid if j not in forced], size - len(forced)))


def reduce_group(scores: Array, valid: Sequence[int], how: str, scaling: float) -> Array:
    """One ranking [T] for the query heads of one group, scores [G, T]."""
    if how == "max":
        return np.asarray(scores.max(axis=0))
    if how == "mean":
        return np.asarray(scores.mean(axis=0))
    assert how == "softmax"  # the mean attention weight; its logarithm ranks alike and keeps small weights apart
    weights = np.zeros_like(scores)
    for g in range(len(scores)):
        best = max(scores[g, j] for j in valid)
        for j in valid:
            weights[g, j] = math.exp(scaling * (scores[g, j] - best))
        weights[g] /= weights[g].sum()
    return np.array([math.log(weights[:, j].mean()) if j in valid else -math.inf for j in range(scores.shape[1])])


def attend(
    q: Array,
    k: Array,
    v: Array,
    rows: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sink: float | None = None,
) -> Array:
    """Exact softmax attention of one query [D] over the given rows of k and v [T, D]; no rows give zeros.

    `softcap` bounds the scaled logits; `sink` is one more logit, which takes weight and carries no value.
    """
    if len(rows) == 0:
        return np.zeros(v.shape[-1])
    logits = [scaling * float(q @ k[j]) for j in rows]
    if softcap is not None:
        logits = [softcap * math.tanh(logit / softcap) for logit in logits]
    others = [] if sink is None else [sink]
    highest = max(logits + others)
    weights = [math.exp(logit - highest) for logit in logits]
    total = sum(weights) + sum(math.exp(logit - highest) for logit in others)
    return np.asarray(sum(w / total * v[j] for w, j in zip(weights, rows, strict=True)))


@dataclass
class Result:
    out: Array  # [B, Hq, Q, D]
    selected: dict[tuple[int, int, int], list[int]]  # (row, query head, query) -> ascending key slots
    margin: float  # smallest gap between the last key taken and the first one left, over all rows; 0 is a tie


def fasa(
    q: Array,
    k: Array,
    v: Array,
    chunks: npt.NDArray[np.int64],
    *,
    n_fac: float,
    scaling: float | None = None,
    n_sink: int = 0,
    n_recent: int = 0,
    group_reduce: str = "max",
    key_mask: npt.NDArray[np.bool_] | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    window: int | None = None,
) -> Result:
    """The whole method: TIP on the chunks [Hkv or Hq, n_tip, 2], then attention over what it selected."""
    batch, heads, queries, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    scale = dim**-0.5 if scaling is None else scaling
    out = np.zeros((batch, heads, queries, v.shape[-1]))
    selected: dict[tuple[int, int, int], list[int]] = {}
    margin = math.inf

    for b in range(batch):
        for i in range(queries):
            valid = valid_keys(length - queries + i, None if key_mask is None else key_mask[b].tolist(), window)
            for n in range(kv_heads):
                members = range(n * group, (n + 1) * group)
                rank = {}
                for h in members:
                    rank[h] = score(q[b, h, i], k[b, n], chunks[h if len(chunks) == heads else n])
                if valid and group_reduce != "none" and len(chunks) != heads:
                    shared = reduce_group(np.stack([rank[h] for h in members]), valid, group_reduce, scale)
                    rank = dict.fromkeys(members, shared)
                for h in members:
                    rows = select(rank[h], valid, n_fac, n_sink, n_recent)
                    selected[b, h, i] = rows
                    sink = None if sinks is None else float(sinks[h])
                    out[b, h, i] = attend(q[b, h, i], k[b, n], v[b, n], rows, scale, softcap, sink)
                    margin = min(margin, _margin(rank[h], valid, rows, n_sink, n_recent))
    return Result(out, selected, margin)


def _margin(scores: Array, valid: list[int], rows: list[int], n_sink: int, n_recent: int) -> float:
    forced = {*valid[:n_sink], *valid[max(0, len(valid) - n_recent) :]}
    taken = [scores[j] for j in rows if j not in forced]
    left = [scores[j] for j in valid if j not in rows]
    return float(min(taken) - max(left)) if taken and left else math.inf


def dense(q: Array, k: Array, v: Array, scaling: float | None = None) -> Array:
    """Causal dense attention, grouped heads: every valid key selected."""
    every = np.zeros((k.shape[1], 0, 2), dtype=np.int64)
    return fasa(q, k, v, every, n_fac=k.shape[2], scaling=scaling).out


def contextual_agreement(q: Array, k: Array, pairs: Sequence[Sequence[int]], top_k: int) -> Array:
    """CA_K of every chunk, mean over queries with at least top_k keys and over batch rows -> [Hq, chunks]."""
    batch, heads, queries, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    table = np.zeros((heads, len(pairs)))
    for h in range(heads):
        counted = 0
        for b in range(batch):
            for i in range(queries):
                keys = range(length - queries + i + 1)
                if len(keys) < top_k:
                    continue
                counted += 1
                row = k[b, h // group]
                full = set(top(score(q[b, h, i], row, pairs), keys, top_k))
                for c, pair in enumerate(pairs):
                    alone = set(top(score(q[b, h, i], row, [pair]), keys, top_k))
                    table[h, c] += len(full & alone) / top_k
        table[h] /= counted
    return table


def dominant(table: Array, n_tip: int, kv_heads: int | None = None) -> npt.NDArray[np.int64]:
    """The n_tip chunks of highest agreement, ascending; table [heads, chunks], averaged over each group if kv_heads.

    Agreement counts hits, so equal counts are equal: what differs beyond the sixth decimal is the rounding of float32.
    """
    if kv_heads is not None:
        group = len(table) // kv_heads
        table = np.stack([table[n * group : (n + 1) * group].mean(axis=0) for n in range(kv_heads)])
    return np.array([sorted(top(row, range(len(row)), n_tip)) for row in table.round(6)])
