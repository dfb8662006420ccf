"""The method in plain loops: the specification that every fast path must equal. Read this first.

No flex_attention, compilation, cache or packed ranking: a stable sort, a list of slots, a softmax.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fasa_flex.core.budget import SINKS, Budget
from fasa_flex.core.completion import BLOCK, Completion
from fasa_flex.core.softmax import Softmax


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranking: Tensor,
    valid: Tensor,
    budget: Budget,
    softmax: Softmax,
    scores: Tensor | None = None,
    completion: Completion | None = None,
) -> Tensor:
    """Compute exact attention to the best-ranked keys (the paper's TIP and FAC), and complete it.

    Args:
        query: float [B, Hq, Q, D]; key: float [B, Hkv, T, D]; value: float [B, Hkv, T, Dv].
        ranking: float32 [B, Hkv, G or 1, Q, T]; a higher number ranks first.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        budget: number of keys per query; ``softmax`` and ``completion`` are as in `fasa_flex.core.method.Call`.
        scores: float32 [B, Hkv, G, Q, T], estimates of q . k, required for a ``completion``; None: no completion.

    Returns:
        [B, Hq, Q, Dv]; zeros for a query without valid keys.
    """
    batch, query_heads, q_len, _ = query.shape
    group = query_heads // key.shape[1]
    valid = valid.expand(batch, 1, 1, q_len, -1)
    wide = torch.promote_types(query.dtype, torch.float32)  # a dot product may be too large for half precision
    rows = []
    for b in range(batch):
        for head in range(query_heads):
            kv_head, member = divmod(head, group)
            keys, values = key[b, kv_head], value[b, kv_head]
            for q in range(q_len):
                candidates, one_query = valid[b, 0, 0, q], query[b, head, q].to(wide)
                ranks = ranking[b, kv_head, min(member, ranking.shape[2] - 1), q]
                slots = reference_selection(ranks, candidates, budget.of_head(kv_head))
                logits = softmax.cap(keys[slots].to(wide) @ (one_query * softmax.scaling))
                out, mass = logits.softmax(0) @ values[slots].to(wide), logits.logsumexp(0)
                if completion is not None and scores is not None:
                    estimates = softmax.logits(scores[b, kv_head, member, q]).to(wide)
                    share = (estimates[slots].logsumexp(0) - estimates[candidates].logsumexp(0)).exp()
                    factor = softmax.scaling * completion.strength
                    remainder = reference_remainder(one_query, keys, values, candidates, factor, completion.by_all)
                    if remainder is not None:
                        out, mass = share * out + (1 - share) * remainder, mass - share.log()
                if softmax.sinks is not None:
                    out = out * torch.sigmoid(mass - softmax.sinks[head].to(wide))
                rows.append(out.to(value.dtype))
    return torch.stack(rows).view(batch, query_heads, q_len, value.shape[-1])


def reference_remainder(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, factor: float, by_all: bool = False
) -> Tensor | None:
    """Estimate the value of one query's unselected keys to first order: [Dv], or None if no key is covered.

    Args:
        query: float32 or float64 [D].
        key: [T, D].
        value: [T, Dv].
        valid: bool [T], the keys that the query may attend to.
        factor: lambda * scaling (`fasa_flex.core.completion`).
        by_all: whether all valid keys are covered.
    """
    candidates = valid.nonzero().flatten()
    covered = candidates if by_all else candidates[SINKS : len(candidates) // BLOCK * BLOCK]
    if not len(covered):
        return None
    keys, values = key[covered].to(query.dtype), value[covered].to(query.dtype)
    covariance = (keys - keys.mean(0)).T @ (values - values.mean(0)) / len(covered)
    return values.mean(0) + factor * query @ covariance


def reference_selection(scores: Tensor, valid: Tensor, budget: Budget) -> Tensor:
    """Select the slots of one query by scores [T] among valid keys, bool [T]: int64 [min(budget, valid keys)]."""
    n_fac = budget.n_fac
    assert not isinstance(n_fac, tuple)  # the budget of one head is one number
    candidates = valid.nonzero().flatten().tolist()
    allowed = math.ceil(len(candidates) * Fraction(repr(n_fac))) if isinstance(n_fac, float) else n_fac
    n_sink, n_recent = budget.forced(allowed)
    forced = candidates[:n_sink] + candidates[max(n_sink, len(candidates) - n_recent) :] if n_sink + n_recent else []
    by_score = [candidates[i] for i in scores[valid].sort(descending=True, stable=True).indices.tolist()]
    chosen = list(dict.fromkeys(forced + by_score))[:allowed]
    return torch.tensor(chosen, dtype=torch.long, device=scores.device)
