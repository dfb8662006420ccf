"""The method in plain loops: what every fast path must equal. Read this first.

No flex, no compilation, no cache, no ranking tricks: a stable sort, a list of slots, a softmax.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fasa_flex.budget import Budget
from fasa_flex.softmax import Softmax


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    valid: Tensor,
    budget: Budget,
    softmax: Softmax,
) -> Tensor:
    """Exact attention over the best-scored keys (the paper's TIP and FAC).

    Args:
        query: float [B, Hq, Q, D]; key and value: float [B, Hkv, T, D].
        scores: float32 [B, Hkv, G or 1, Q, T]; valid: bool [B or 1, 1, 1, Q, T].

    Returns:
        [B, Hq, Q, D]; zeros for a query without valid keys.
    """
    batch, query_heads, q_len, _ = query.shape
    group = query_heads // key.shape[1]
    valid = valid.expand(batch, 1, 1, q_len, -1)
    wide = torch.promote_types(query.dtype, torch.float32)  # a dot product may be too large for half precision
    rows = []
    for b in range(batch):
        for head in range(query_heads):
            kv_head, member = divmod(head, group)
            for q in range(q_len):
                ranking = scores[b, kv_head, min(member, scores.shape[2] - 1), q]
                slots = reference_selection(ranking, valid[b, 0, 0, q], budget.of_head(kv_head))
                logits = softmax.cap(key[b, kv_head, slots].to(wide) @ query[b, head, q].to(wide) * softmax.scaling)
                if softmax.sinks is not None:
                    logits = torch.cat([logits, softmax.sinks[head, None].to(wide)])
                rows.append(logits.softmax(0)[: len(slots)] @ value[b, kv_head, slots].to(wide))
    return torch.stack(rows).view(batch, query_heads, q_len, value.shape[-1]).to(value.dtype)


def reference_selection(scores: Tensor, valid: Tensor, budget: Budget) -> Tensor:
    """The slots one query attends to, from its scores [T] and valid keys bool [T]; int64 [min(budget, valid)]."""
    n_fac, n_sink, n_recent = budget.n_fac, budget.n_sink, budget.n_recent
    assert not isinstance(n_fac, tuple)  # of one head
    candidates = valid.nonzero().flatten().tolist()
    allowed = math.ceil(len(candidates) * Fraction(repr(n_fac))) if isinstance(n_fac, float) else n_fac
    forced = candidates[:n_sink] + candidates[max(n_sink, len(candidates) - n_recent) :] if n_sink + n_recent else []
    by_score = [candidates[i] for i in scores[valid].sort(descending=True, stable=True).indices.tolist()]
    chosen = list(dict.fromkeys(forced + by_score))[:allowed]
    return torch.tensor(chosen, dtype=torch.long, device=scores.device)
