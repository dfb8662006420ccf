"""Token scorers: how important each key is to each query. The dominant-chunk scorer is the paper's TIP.

Every method of sparse attention here is a scorer; selection, masks and attention are shared. Writing another one takes
a `__call__` of the signature of `Scorer`, or `follow` of `SequenceScorer` where a method goes by more than the query
and the keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fasa_flex.budget import Budget
from fasa_flex.config import GroupReduce
from fasa_flex.operators import operator
from fasa_flex.packing import PackedKeys, dot_products
from fasa_flex.reads import ReadShare
from fasa_flex.realize import read_as_floats


class Scorer(Protocol):
    """Importance of keys to queries; it only ranks and is never an attention weight."""

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
    """

    query: Tensor
    key: Tensor
    valid: Tensor
    sparse: Tensor
    first: int
    first_slot: int
    budget: Budget
    scaling: float


@runtime_checkable
class SequenceScorer(Protocol):
    """A method that goes by more than a query and the keys: by which keys are valid, or by the queries before.

    It is shown every forward of its layer, the dense prefill too. One that evicts ranks what it dropped lowest, -inf,
    for good: as it keeps no fewer keys than the budget, none of these is selected. One that remembers nothing of
    earlier forwards says so by an attribute ``remembers = False``; its cache may be cropped and shared.
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
    """TIP: the dot product over the dominant chunks alone, ``S[j] = sum_i q[i] . k[j, i]`` for i in I_dom.

    Attributes:
        dims: int64 [Hkv or Hq, 2 * n_tip], the dimensions of each head's chunks.
    """

    dims: Tensor

    @classmethod
    def from_chunks(cls, chunks: Tensor) -> DominantChunks:
        """From dimension pairs [Hkv or Hq, n_tip, 2]."""
        return cls(chunks.flatten(1))

    def pack(self, key: Tensor) -> Tensor:
        """The scored dimensions of ``key`` [B, Hkv, T, D], contiguous [B, Hkv, T, 2 * n_tip]; one set per KV head."""
        return _take_dims(key, self.dims)

    def of_query(self, query: Tensor) -> Tensor:
        """The scored dimensions of ``query`` [B, Hq, Q, D]: [B, Hkv, G * Q, 2 * n_tip]; one set per KV head."""
        batch, _, _, head_dim = query.shape
        return _take_dims(query.reshape(batch, len(self.dims), -1, head_dim), self.dims)

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
                scores = dot_products(query_dims, self.pack(key) if packed_keys is None else packed_keys)
        else:
            query_dims = _take_dims(query, self.dims)
            scores = dot_products(query_dims, _take_dims(key.repeat_interleave(group, dim=1), self.dims))
        return scores.view(batch, kv_heads, group, q_len, kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """``2 n_tip`` of a key's dimensions; for each query head anew where each has chunks of its own."""
        heads, width = self.dims.shape
        return ReadShare(ranking=min(0.5, heads // kv_heads * width / (2 * head_dim)))


def _take_dims(states: Tensor, dims: Tensor) -> Tensor:
    batch, _, length, _ = states.shape
    return states.gather(-1, dims.to(states.device)[None, :, None].expand(batch, -1, length, -1))


def reduce_group(scores: Tensor, valid: Tensor, how: GroupReduce, scaling: float) -> Tensor:
    """One ranking per key/value head from those of its query heads.

    Args:
        scores: float32 [B, Hkv, G, Q, T].
        valid: bool [B or 1, 1, 1, Q, T], used by ``"softmax"``, which weighs each head's scores against its own keys.
        how: ``"max"``, ``"mean"``, ``"softmax"`` (the sum of the heads' attention weights) or ``"none"``.
        scaling: the softmax scale, as in attention.

    Returns:
        float32 [B, Hkv, 1, Q, T], or the scores as they are for ``"none"``.
    """
    if how == "none" or scores.shape[2] == 1:
        return scores
    if how == "max":
        return scores.amax(2, keepdim=True)
    if how == "mean":
        return scores.mean(2, keepdim=True)
    valid = read_as_floats(valid)
    if torch.compiler.is_compiling() and scores.device.type == "cpu":  # head by head, so that a row stays in the cache
        softmaxes = (torch.where(valid, member * scaling, -torch.inf).softmax(-1) for member in scores.split(1, dim=2))
        return functools.reduce(torch.add, softmaxes)
    logits = torch.where(valid, scores * scaling, -torch.inf)
    return attention_weights(logits).sum(2, keepdim=True)


@operator("attention_weights", torch.empty_like)
def attention_weights(logits: Tensor) -> Tensor:
    """Softmax along the last dimension, as torch has it: Inductor's own takes every exponential twice (torch 2.13)."""
    return logits.softmax(-1)
