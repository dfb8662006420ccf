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


def score(
    q: Array, k: Array, pairs: Pairs, mean: Array | None = None, bits: int | None = None, weights: Array | None = None
) -> Array:
    """Sum over chunks of q^[i] . k^[i] for one query [D] against the keys [T, D] -> [T].

    With a mean key [D] the keys' difference from it counts, weighted by chunk, and the whole of the mean key:
    q . m + sum_i w_i q^[i] . (k - m)^[i]. With bits the differences are rounded key by key.
    """
    pairs = np.asarray(list(pairs), dtype=np.int64).reshape(-1, 2)
    centre = np.zeros(k.shape[1]) if mean is None else mean
    part = (k - centre)[:, pairs.flatten()]
    if bits is not None:
        part = np.stack([rounded(row, bits) for row in part])
    total = np.full(len(k), float(q @ centre))
    for i, (a, b) in enumerate(pairs):
        weight = 1.0 if weights is None else weights[i]
        total += weight * (q[a] * part[:, 2 * i] + q[b] * part[:, 2 * i + 1])
    return total


def rounded(row: Array, bits: int) -> Array:
    """A key's numbers as whole multiples of one scale, at most 2^(bits-1) - 1 of it; the scale is held in float16."""
    most = 2 ** (bits - 1) - 1
    scale = float(np.float16(max(float(np.abs(row).max()) / most, float(np.finfo(np.float16).tiny))))
    return np.asarray([scale * max(-most, min(most, round(float(x) / scale))) for x in row])


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


def forced(valid: Sequence[int], size: int, n_sink: int | None, n_recent: int | None) -> list[int]:
    """The first and the last valid keys, which are always selected, in a budget of `size` tokens.

    None: 4 and 32 of them, but at most an eighth and a half of the budget. Where a share of few keys is fewer than the
    forced ones, the first of them are in.
    """
    first = min(4, size // 8) if n_sink is None else n_sink
    last = min(32, size // 2) if n_recent is None else n_recent
    return list(dict.fromkeys([*valid[:first], *valid[max(0, len(valid) - last) :]]))[:size]


def select(
    scores: Array, valid: Sequence[int], n_fac: float, n_sink: int | None = 0, n_recent: int | None = 0
) -> list[int]:
    """The selected keys, ascending: the forced ones, inside the budget, and the best of the others."""
    size = budget(n_fac, len(valid))
    if size >= len(valid):
        return sorted(valid)
    first = forced(valid, size, n_sink, n_recent)
    return sorted(first + top(scores, [j for j in valid if j not in first], size - len(first)))


def sample(valid: Sequence[int]) -> list[int]:
    """The keys that normalise a ranking: the first 4, the last 64, and every 32nd from the first on."""
    return sorted({*valid[:4], *valid[-64:], *valid[::32]})


def log_sum_exp(logits: Iterable[float]) -> float:
    """Of no logit: -inf."""
    logits = list(logits)
    if not logits:
        return -math.inf
    highest = max(logits)
    return highest + math.log(sum(math.exp(logit - highest) for logit in logits))


def reduce_group(scores: Array, valid: Sequence[int], how: str, scaling: float, softcap: float | None = None) -> Array:
    """One ranking [T] for the query heads of one group, scores [G, T].

    By weights it is the log of their sum over heads, each head normalised over a sample of the keys, or ("exact") over
    all of them.
    """
    if how == "max":
        return np.asarray(scores.max(axis=0))
    if how == "mean":
        return np.asarray(scores.mean(axis=0))
    over = {"softmax": sample(valid), "softmax_exact": list(valid)}[how]
    logits = [[capped(scaling * float(score), softcap) for score in head] for head in scores]
    norms = [log_sum_exp(head[j] for j in over) for head in logits]
    ranking = [
        log_sum_exp(head[j] - norm for head, norm in zip(logits, norms, strict=True)) if j in valid else -math.inf
        for j in range(scores.shape[1])
    ]
    return np.array(ranking)


def capped(logit: float, softcap: float | None) -> float:
    """Under a soft cap."""
    return logit if softcap is None else softcap * math.tanh(logit / softcap)


def attend(
    q: Array,
    k: Array,
    v: Array,
    rows: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sink: float | None = None,
    rest: tuple[float, Array] | None = None,
) -> Array:
    """Exact softmax attention of one query [D] over the given rows of k and v [T, D]; no rows give zeros.

    `softcap` bounds the scaled logits; `sink` is one more logit, which takes weight and carries no value. `rest` stands
    for other keys: their mass against that of the rows, and the one value [Dv] of them all.
    """
    if len(rows) == 0:
        return np.zeros(v.shape[-1])
    logits = [capped(scaling * float(q @ k[j]), softcap) for j in rows]
    others = [] if sink is None else [sink]
    highest = max(logits + others)
    weights = [math.exp(logit - highest) for logit in logits]
    out = np.asarray(sum(w * v[j] for w, j in zip(weights, rows, strict=True)))
    total = sum(weights)
    if rest is not None:
        mass, value = rest
        out, total = out + total * mass * value, total * (1 + mass)
    return out / (total + sum(math.exp(logit - highest) for logit in others))


def first_order(q: Array, k: Array, v: Array, valid: Sequence[int], factor: float) -> Array | None:
    """The value [Dv] of keys that are not attended to: their mean value, tilted by the query; None: not known.

    Mean and covariance are those of the covered keys: whole blocks of 64 of the valid ones, but the first four.
    """
    covered = [j for number, j in enumerate(valid, start=1) if 4 < number <= len(valid) // 64 * 64]
    if not covered:
        return None
    mean_k = sum(k[j] for j in covered) / len(covered)
    mean_v = sum(v[j] for j in covered) / len(covered)
    tilt = sum(float(q @ (k[j] - mean_k)) * (v[j] - mean_v) for j in covered) / len(covered)
    return np.asarray(mean_v + factor * tilt)


def left_out(logits: Sequence[float], valid: Sequence[int], rows: Sequence[int]) -> float:
    """The mass of the valid keys that are not attended to against those that are, by estimated logits [T]."""
    return math.exp(log_sum_exp(logits[j] for j in valid if j not in rows) - log_sum_exp(logits[j] for j in rows))


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
    n_sink: int | None = 0,
    n_recent: int | None = 0,
    group_reduce: str = "max",
    key_mask: npt.NDArray[np.bool_] | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    window: int | None = None,
    mean_key: Array | None = None,
    weights: Array | None = None,
    bits: int | None = None,
    strength: float | None = None,
) -> Result:
    """The whole method: TIP on the chunks [Hkv or Hq, n_tip, 2], then attention over what it selected.

    `mean_key` [Hkv, D] is taken off the keys before they are scored, in `bits` each (None: exactly), and `weights`
    [Hkv, n_tip] are the chunks'. With a `strength` the keys left out are completed, to first order; 0: by their mean
    value.
    """
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
                mean, weigh = (None if table is None else table[n] for table in (mean_key, weights))
                scores = {}
                for h in members:
                    own = chunks[h if len(chunks) == heads else n]
                    scores[h] = score(q[b, h, i], k[b, n], own, mean, bits, weigh)
                rank = scores
                if valid and group_reduce != "none" and len(chunks) != heads and group > 1:
                    shared = reduce_group(np.stack([scores[h] for h in members]), valid, group_reduce, scale, softcap)
                    rank = dict.fromkeys(members, shared)
                for h in members:
                    rows = select(rank[h], valid, n_fac, n_sink, n_recent)
                    selected[b, h, i] = rows
                    sink = None if sinks is None else float(sinks[h])
                    rest = None
                    if strength is not None and len(rows) < len(valid):
                        value = first_order(q[b, h, i], k[b, n], v[b, n], valid, strength * scale)
                        logits = [capped(scale * float(s), softcap) for s in scores[h]]
                        rest = None if value is None else (left_out(logits, valid, rows), value)
                    out[b, h, i] = attend(q[b, h, i], k[b, n], v[b, n], rows, scale, softcap, sink, rest)
                    always = forced(valid, budget(n_fac, len(valid)), n_sink, n_recent)
                    margin = min(margin, _margin(rank[h], valid, rows, always))
    return Result(out, selected, margin)


def _margin(scores: Array, valid: list[int], rows: list[int], always: list[int]) -> float:
    taken = [scores[j] for j in rows if j not in always]
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
