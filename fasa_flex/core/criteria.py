"""Criteria for dominant chunks, computed from the contributions of the chunks to the logits.

The logit of a key is the sum of one part per chunk, ``s[t] = sum_c scaling * q[c] . k[t, c]``. Over the keys of a query
these parts have a covariance matrix [chunks, chunks]. Its diagonal holds the variance of each chunk's part, its sum is
the variance of the logits. A part that hardly varies over the keys hardly changes their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.option_types import Criterion as Criterion

_BYTES = 1 << 26
_EPSILON = 1e-6
"""A residual variance below this share of the original one is rounding error: tables are float32."""


@dataclass(frozen=True, eq=False)
class LogitStatistics:
    """Statistics of one layer that the criteria need, averaged over batch and queries.

    Attributes:
        variance: float64 [Hq, chunks], variance over keys of each chunk's part of the logits.
        covariance: float64 [Hkv, chunks, chunks], covariance over keys between the parts, averaged over the group.
        mean_key: float64 [Hkv, D], mean of the keys.
    """

    variance: Tensor
    covariance: Tensor
    mean_key: Tensor


@torch.no_grad()
def logit_statistics(query: Tensor, key: Tensor, visible: Tensor, chunks: Tensor, scaling: float) -> LogitStatistics:
    """Compute variance and covariance over keys of the chunks' parts of the logits, and the mean key.

    They follow from the covariance of the keys' dimensions, so that no logit is computed: O(T D^2) for keys that all
    queries see, O(D^2) for each pair of a query and a key that only some queries see. Queries have equal weights.

    Args:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE; Hq a multiple of Hkv.
        visible: bool [B or 1, Q, T], the keys that each query may attend to, at least one.
        chunks: int64 [chunks, 2], the two dimensions of each chunk; together they name each of D once.
        scaling: factor that the softmax multiplies dot products by; the parts are those of scaled logits.
    """
    (batch, query_heads, q_len, head_dim), kv_heads = query.shape, key.shape[1]
    order = chunks.to(query.device).flatten()
    query, key = query.unflatten(1, (kv_heads, -1)), key[..., order]
    visible = visible.expand(batch, -1, -1)
    centre = key.mean(2, keepdim=True, dtype=torch.float32).double()  # any nearby point: less cancellation
    common = visible.all(1)
    others = (visible.any(1) & ~common).any(0).nonzero().flatten()
    shared = _moments(key, centre, common[:, None])
    extra, shown = key[:, :, others], (visible & ~common[:, None])[..., others]
    n_pairs = len(chunks)
    variance = query.new_zeros(kv_heads, query_heads // kv_heads, n_pairs, dtype=torch.float64)
    covariance = query.new_zeros(kv_heads, n_pairs, n_pairs, dtype=torch.float64)
    mean_key = query.new_zeros(kv_heads, head_dim, dtype=torch.float64)
    for piece in _pieces(q_len, 24 * batch * kv_heads * head_dim * (head_dim + len(others))):
        queries = query[:, :, :, piece][..., order].double() * scaling
        count, first, second = (a + b for a, b in zip(shared, _moments(extra, centre, shown[:, piece]), strict=True))
        mean = first / count
        covered = second / count[..., None] - mean[..., :, None] * mean[..., None, :]
        squares = torch.einsum("bhgqi,bhgqj->bhqij", queries, queries)
        parts = (covered * squares).sum((0, 2)).view(kv_heads, n_pairs, 2, n_pairs, 2)
        covariance += parts.sum((2, 4))
        within = covered.unflatten(-1, (n_pairs, 2)).unflatten(-3, (n_pairs, 2)).diagonal(dim1=-4, dim2=-2)
        pairs = queries.unflatten(-1, (n_pairs, 2))
        variance += torch.einsum("bhgqci,bhqijc,bhgqcj->hgc", pairs, within, pairs)
        mean_key += (mean + centre).sum((0, 2))
    samples = batch * q_len
    return LogitStatistics(
        (variance / samples).clamp(min=0).flatten(0, 1),
        covariance / (samples * (query_heads // kv_heads)),
        torch.empty_like(mean_key).index_copy_(-1, order, mean_key / samples),
    )


def causal(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """The causal mask of queries at the last ``q_len`` positions: bool [1, Q, T]."""
    last = torch.arange(kv_len - q_len, kv_len, device=device)
    return (torch.arange(kv_len, device=device) <= last[:, None])[None]


def _moments(key: Tensor, centre: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the shown keys [B, Q, T], less ``centre``: of 1 [B, 1, Q, 1], of k [B, Hkv, Q, D], of k k^T [.., D, D].

    The sums are float64; keys [B, Hkv, T, D] are read in pieces.
    """
    batch, kv_heads, kv_len, head_dim = key.shape
    rows = shown.shape[1]
    first = key.new_zeros(batch, kv_heads, rows, head_dim, dtype=torch.float64)
    second = key.new_zeros(batch, kv_heads, rows, head_dim, head_dim, dtype=torch.float64)
    for piece in _pieces(kv_len, 16 * batch * kv_heads * head_dim * rows):
        keys = key[:, :, piece].double() - centre
        chosen = shown[:, None, :, piece].double()
        first += chosen @ keys
        second += (chosen[..., None] * keys[:, :, None]).mT @ keys[:, :, None]
    return shown.sum(-1, dtype=torch.float64)[:, None, :, None], first, second


def _pieces(length: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, _BYTES // bytes_each)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def most_explaining(covariance: Tensor, n_tip: int) -> Tensor:
    """Choose greedily the chunks that explain most of the logits' variance; ties go to the lower chunk.

    Each step adds the chunk whose part explains most of the logits' residual variance, after regression of both on the
    chunks chosen so far.

    Args:
        covariance: float [..., chunks, chunks], positive semi-definite.
        n_tip: number of chunks to choose.

    Returns:
        int64 [..., n_tip], chunk numbers, ascending.
    """
    rest = covariance.double()
    least = _EPSILON * rest.diagonal(dim1=-2, dim2=-1)
    taken = torch.zeros_like(least, dtype=torch.bool)
    for _ in range(n_tip):
        left = rest.diagonal(dim1=-2, dim2=-1)
        gain = torch.where(left > least, rest.sum(-1) ** 2 / left, 0).masked_fill(taken, -1)
        best = gain.argmax(-1, keepdim=True)
        taken.scatter_(-1, best, True)
        column = rest.gather(-1, best[..., None, :].expand(*rest.shape[:-1], 1))
        variance, enough = left.gather(-1, best)[..., None], (left > least).gather(-1, best)[..., None]
        rest = rest - torch.where(enough, column * column.mT / variance, 0)
    chosen: Tensor = taken.nonzero()[:, -1]
    return chosen.view(*taken.shape[:-1], n_tip)


def least_squares_weights(covariance: Tensor, chosen: Tensor) -> Tensor:
    """Compute the weights with which the sum of the chosen chunks' parts is nearest to the logits, up to a constant.

    ``w = 1 + A_SS^+ A_SR 1``, with covariance A, chosen chunks S and other chunks R; w = 1 if S and R are uncorrelated,
    or R is empty.

    Args:
        covariance: float [..., chunks, chunks], A.
        chosen: int64 [..., n], S.

    Returns:
        float32 [..., n].
    """
    rows = covariance.double().gather(-2, chosen[..., None].expand(*chosen.shape, covariance.shape[-1]))
    inner = rows.gather(-1, chosen[..., None, :].expand(*chosen.shape, chosen.shape[-1]))
    outer = rows.scatter(-1, chosen[..., None, :].expand_as(inner), 0).sum(-1, keepdim=True)
    inverse: Tensor = torch.linalg.pinv(inner, rtol=_EPSILON, hermitian=True)
    return (1 + inverse @ outer)[..., 0].float()


def explained_share(covariance: Tensor, chosen: Tensor) -> Tensor:
    """Share of the logits' variance that the chosen chunks explain with least-squares weights: float64 [...], 0 to 1.

    Args:
        covariance: float [..., chunks, chunks], covariance over keys of the chunks' parts.
        chosen: int64 [..., n], chunk numbers.
    """
    weights = least_squares_weights(covariance, chosen).double()
    with_logits = covariance.double().sum(-1).gather(-1, chosen)
    total = covariance.double().sum((-2, -1))
    return torch.where(total > 0, (weights * with_logits).sum(-1) / total, 1.0)
