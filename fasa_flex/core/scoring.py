"""Token scorers: how important each key is to each query. The dominant-chunk scorer is the paper's TIP.

Every method of sparse attention here is a scorer; selection, masks and attention are shared. Writing another one takes
a `__call__` of the signature of `Scorer`, or `follow` of `SequenceScorer` where a method goes by more than the query
and the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedDtype, PackedKeys, as_packed, dot_products


class Scorer(Protocol):
    """Importance of keys to queries; it ranks them and is no attention weight.

    One whose scores estimate the dot products ``q . k`` says so by an attribute ``estimates_logits = True``: then what
    they say of the unselected keys' mass completes attention (`fasa_flex.core.completion`). One whose mean value is
    that of all valid keys, and not of the covered ones alone, says so by ``completes_by_all = True``. One with a method
    ``attend`` has that in place of a softmax over the selected keys (`fasa_flex.baselines.sampled`).
    """

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """Score every key, valid or not.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            packed_keys: what `DominantChunks.pack` makes of ``key``, if a cache holds it; others ignore it.

        Returns:
            float32 [B, Hkv, G, Q, T] per query head of each group, or [B, Hkv, 1, Q, T] where the group shares its
            scores.
        """
        ...


def check_scores(scores: object, query: Tensor, key: Tensor) -> None:
    """Refuse what a scorer made if it is not what `Scorer` says.

    Raises:
        ValueError: no tensor of numbers [B, Hkv, G or 1, Q, T].
    """
    (batch, query_heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    group = query_heads // kv_heads
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if got not in [(batch, kv_heads, shared, q_len, kv_len) for shared in (group, 1)]:
        raise ValueError(
            f"a scorer must return scores {(batch, kv_heads, group, q_len, kv_len)}, or 1 in the third place, "
            f"got {got}; expand what query heads, queries or keys share."
        )


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward of one layer, of one token or many, as a `SequenceScorer` is shown it.

    Attributes:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE.
        valid: bool [B or 1, 1, 1, Q, T], which keys each query may attend to: causal, no padding. A query of padding
            may attend to none, or to keys before its own.
        sparse: bool [B, Q], the queries that attend to a selection; the others attend to all valid keys.
        first: the first query that is sparse in some row; Q where none is.
        first_slot: the slot of the first query; 0 begins a sequence.
        budget: of the layer.
        scaling: of the softmax.
        cache: which holds the keys, so that a method may remember sequences by it; None: there is none.
    """

    query: Tensor
    key: Tensor
    valid: Tensor
    sparse: Tensor
    first: int
    first_slot: int
    budget: Budget
    scaling: float
    cache: object | None = None


@runtime_checkable
class SequenceScorer(Protocol):
    """A method that goes by more than a query and the keys: by which keys are valid, or by the queries before.

    It is shown every forward of its layer, the dense prefill too. One that evicts ranks what it dropped lowest, -inf,
    for good: as it keeps no fewer keys than the budget, none of these is selected. One that remembers nothing of
    earlier forwards says so by an attribute ``remembers = False``; its cache may be cropped and shared. One that does
    keeps it by ``forward.cache``, since sequences are continued in turn, and in several threads at once.
    """

    def follow(self, forward: Forward) -> Tensor:
        """Score every key for the queries from ``forward.first`` on.

        Returns:
            float32 [B, Hkv, G or 1, Q - first, T]; what it says of dense queries is not read.

        Raises:
            ValueError: a forward that does not continue the one before, for a method that remembers it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Given:
    """Scores that are known already, as a `Scorer`: float32 [B, Hkv, G or 1, Q, T]."""

    scores: Tensor

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        return self.scores


@dataclass(frozen=True, eq=False)
class DominantChunks:
    """TIP: the dot product over the dominant chunks, the other chunks' keys at their mean (Wang et al., 2026).

    ``S[j] = q . m + sum_i w[i] (q[i] . (k[j, i] - m[i]))`` for i in I_dom, with the mean key m. The paper has m = 0 and
    w = 1; an m shifts all scores of a query head alike, and lets keys be held in few bits.

    Attributes:
        dims: int64 [Hkv or Hq, 2 * n_tip], the dimensions of each head's chunks.
        mean_key: float32 [Hkv, D], m; None: 0. Sets per query head have none.
        weights: float32 [Hkv, 2 * n_tip], w of each of ``dims``; None: 1.
        dtype: the precision that keys are rounded to before they are compared; None: their own.
    """

    dims: Tensor
    mean_key: Tensor | None = None
    weights: Tensor | None = None
    dtype: PackedDtype | None = None

    estimates_logits = True

    @classmethod
    def from_chunks(cls, chunks: Tensor) -> DominantChunks:
        """From dimension pairs [Hkv or Hq, n_tip, 2]."""
        return cls(chunks.flatten(1))

    def to(self, device: torch.device) -> DominantChunks:
        """The same scorer with its tensors on ``device``."""
        mean_key, weights = (None if held is None else held.to(device) for held in (self.mean_key, self.weights))
        return replace(self, dims=self.dims.to(device), mean_key=mean_key, weights=weights)

    def ranks_as(self, other: DominantChunks) -> bool:
        """Whether both make the same packed keys."""
        mine, theirs = (self.dims, self.mean_key), (other.dims, other.mean_key)
        return self.dtype == other.dtype and all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a.cpu(), b.cpu()))
            for a, b in zip(mine, theirs, strict=True)
        )

    def pack(self, key: Tensor) -> Tensor:
        """``key`` [B, Hkv, T, D] at the scored dimensions, less the mean key: [B, Hkv, T, 2 * n_tip], contiguous."""
        rows = _take_dims(key, self.dims)
        if self.mean_key is None:
            return rows
        return rows - self.mean_key.gather(-1, self.dims).to(rows)[:, None]

    def of_query(self, query: Tensor) -> Tensor:
        """``query`` [B, Hq, Q, D] at the scored dimensions, weighted: [B, Hkv, G * Q, 2 * n_tip]."""
        batch, _, _, head_dim = query.shape
        asked = _take_dims(query.reshape(batch, len(self.dims), -1, head_dim), self.dims)
        return asked if self.weights is None else asked * self.weights.to(asked)[:, None]

    def shift(self, query: Tensor) -> Tensor | None:
        """``q . m``, float32 [B, Hkv, G * Q, 1] of ``query`` [B, Hq, Q, D]; None: there is no mean key."""
        if self.mean_key is None:
            return None
        grouped = query.reshape(query.shape[0], len(self.mean_key), -1, query.shape[3])
        return dot_products(grouped, self.mean_key.to(grouped)[None, :, None].expand(len(query), -1, -1, -1))

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        batch, query_heads, q_len, _ = query.shape
        kv_heads, kv_len = key.shape[1:3]
        group = query_heads // kv_heads
        if self.dims.shape[0] == kv_heads:
            query_dims = self.of_query(query)
            if isinstance(packed_keys, PackedKeys):
                scores = packed_keys.scores(query_dims, kv_len)
            else:
                rows = as_packed(self.pack(key), self.dtype) if packed_keys is None else packed_keys
                scores = dot_products(query_dims, rows)
            shift = self.shift(query)
            if shift is not None:
                scores = scores + shift
        else:
            query_dims = _take_dims(query, self.dims)
            scores = dot_products(query_dims, _take_dims(key.repeat_interleave(group, dim=1), self.dims))
        return scores.view(batch, kv_heads, group, q_len, kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """``2 n_tip`` of a key's dimensions; for each query head anew where each has chunks of its own."""
        heads, width = self.dims.shape
        return ReadShare(ranking=min(0.5, heads // kv_heads * width / (2 * head_dim)))


def estimates_logits(scorer: object) -> bool:
    """Whether a scorer's scores estimate ``q . k``, as completion needs: it says so by ``estimates_logits = True``."""
    return getattr(scorer, "estimates_logits", False) is True


def _take_dims(states: Tensor, dims: Tensor) -> Tensor:
    batch, _, length, _ = states.shape
    return states.gather(-1, dims.to(states.device)[None, :, None].expand(batch, -1, length, -1))
