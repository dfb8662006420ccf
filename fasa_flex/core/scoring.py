"""Scorers, which compute how important each key is to each query. The dominant-chunk scorer is the paper's TIP.

Every method of sparse attention here is a scorer; selection, masks and attention are shared. To add a method, define
`Scorer.score`, or `SequenceScorer.follow` if the scores depend on more than the query and the keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.compiler import keep_rounding
from fasa_flex.core.packed_keys import PackedDtype, PackedKeys, as_packed, dot_products, packed_bytes
from fasa_flex.errors import NotSupportedError

_S = TypeVar("_S", bound="Scorer")


class Scorer(ABC):
    """Computes the importance of keys to queries. It ranks keys and is not an attention weight.

    A subclass defines `score`; the other members have defaults.

    Attributes:
        attend: method that replaces the softmax over the selected keys (`fasa_flex.baselines.sampled`); None: it stays.
        stateful: whether the scores depend on earlier forwards, so that a cropped or shared cache cannot be continued.
        estimates_logits: whether the scores estimate the dot products ``q . k``, so that they give the unselected keys'
            mass for the completion (`fasa_flex.core.completion`).
        completes_by_all: whether the completion's mean value is taken over all valid keys, not over the covered ones.
    """

    attend: Callable[..., Any] | None = None
    stateful = False
    estimates_logits = False
    completes_by_all = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take ``__call__`` for `score`, and ``remembers`` for `stateful`, their names in version 0.1."""
        super().__init_subclass__(**kwargs)
        own: Any = vars(cls)
        if "__call__" in own and cls.score is Scorer.score:
            cls.score = own["__call__"]  # type: ignore[method-assign]  # the class's own method by its former name
        nearest = next(base for base in cls.__mro__ if {"score", "__call__"} & vars(base).keys())
        if "__call__" not in vars(nearest):
            cls.__call__ = cls.score  # type: ignore[method-assign]  # so a decoded token passes one function less
        if "remembers" in own:
            cls.stateful = own["remembers"]

    @abstractmethod
    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """Score every key, valid or not.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            packed_keys: ``key`` packed by `DominantChunks.pack`, if a cache holds it; other scorers ignore it.

        Returns:
            float32 [B, Hkv, G, Q, T], one score per query head; [B, Hkv, 1, Q, T] if the heads of a group share scores.
        """

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `score`; callers call the scorer."""
        return self.score(query, key, packed_keys)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare | None:
        """Bytes that a query reads if the query heads of a group share one selection; None: not stated."""
        return None

    def reads_packed(self, head_dim: int, dtype: torch.dtype) -> float | None:
        """``ReadShare.ranking`` where a cache of ``dtype`` holds packed keys; None: the scorer reads no packed keys."""
        return None

    def shard(self: _S, rank: int, ranks: int) -> _S:
        """Return the part of one rank of a tensor-parallel model; a scorer without tables by head serves any heads."""
        return self

    @property
    def name(self) -> str:
        """Name of the method in errors."""
        return type(self).__name__

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """What a graph of the scores is specialised for, besides the scorer's class."""
        return ()


def check_scores(scores: object, query: Tensor, key: Tensor) -> None:
    """Check the result of a scorer.

    Raises:
        ValueError: ``scores`` is not a tensor [B, Hkv, G or 1, Q, T].
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
    """Inputs of a `SequenceScorer`: one layer's attention in one forward of one or more tokens.

    Attributes:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to: causal, no padding. A query of padding
            may attend to none, or to keys before its own.
        sparse: bool [B, Q], the queries that attend to a selection; the others attend to all valid keys.
        first: index of the first query that is sparse in any row; Q if none is.
        first_slot: slot of the first query; 0: a sequence begins.
        budget: number of keys that each sparse query of this layer attends to.
        scaling: factor that the softmax multiplies dot products by.
        cache: the cache that holds the keys; identifies the sequence in a stateful scorer; None: there is no cache.
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


class SequenceScorer(Scorer):
    """A scorer that also needs the validity mask or earlier queries.

    FASA calls it in every forward of its layer, including the dense prefill. A method that evicts keys scores them -inf
    from then on; since it keeps at least as many keys as the budget, no evicted key is selected. One without state sets
    ``stateful = False``. A stateful one stores its state per ``forward.cache``, since sequences may alternate and may
    run in several threads.
    """

    stateful = True

    @abstractmethod
    def follow(self, forward: Forward) -> Tensor:
        """Score every key for the queries from ``forward.first`` on.

        Returns:
            float32 [B, Hkv, G or 1, Q - first, T]; scores of dense queries have no meaning.

        Raises:
            ValueError: the scorer is stateful and the forward does not continue the previous one.
        """

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """Refuse, since query and keys are not all that the scores depend on.

        Raises:
            NotImplementedError: always.
        """
        raise NotSupportedError(f"{self.name} scores a whole forward, not a query and keys alone; call follow.")


@dataclass(frozen=True, eq=False)
class Given(Scorer):
    """A scorer that returns precomputed scores, float32 [B, Hkv, G or 1, Q, T]."""

    scores: Tensor

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """Return the scores; the arguments are ignored."""
        return self.scores


@dataclass(frozen=True, eq=False)
class DominantChunks(Scorer):
    """TIP: dot products over the dominant chunks; keys have their mean in the other chunks (Wang et al., 2026).

    ``S[j] = q . m + sum_i w[i] (q[i] . (k[j, i] - m[i]))`` for i in I_dom, with the mean key m. The paper has m = 0 and
    w = 1. A mean key shifts all scores of a query head equally; keys less their mean can be stored in fewer bits.

    Attributes:
        dims: int64 [Hkv or Hq, 2 * n_tip], the dimensions of each head's chunks.
        mean_key: float32 [Hkv, D], m; None: 0. Chunk sets per query head have none.
        weights: float32 [Hkv, 2 * n_tip], w of each of ``dims``; None: 1.
        dtype: precision that keys are rounded to before scoring; None: no rounding.
    """

    dims: Tensor
    mean_key: Tensor | None = None
    weights: Tensor | None = None
    dtype: PackedDtype | None = None

    estimates_logits = True

    @classmethod
    def from_chunks(cls, chunks: Tensor) -> DominantChunks:
        """Make a scorer from dimension pairs, int64 [Hkv or Hq, n_tip, 2]."""
        return cls(chunks.flatten(1))

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """As `Scorer`: the heads and widths of the tables, and the dtype."""
        tables = (self.dims, self.mean_key, self.weights)
        return *(None if table is None else tuple(table.shape) for table in tables), self.dtype

    def to(self, device: torch.device) -> DominantChunks:
        """Return the same scorer with its tensors on ``device``."""
        mean_key, weights = (None if states is None else states.to(device) for states in (self.mean_key, self.weights))
        return replace(self, dims=self.dims.to(device), mean_key=mean_key, weights=weights)

    def shard(self, rank: int, ranks: int) -> DominantChunks:
        """Return the part of one rank, with 1 / ``ranks`` of the heads."""
        tables = (self.dims, self.mean_key, self.weights)
        dims, *others = (None if table is None else table.chunk(ranks)[rank].clone() for table in tables)
        assert dims is not None
        return replace(self, dims=dims, mean_key=others[0], weights=others[1])

    def ranks_as(self, other: DominantChunks) -> bool:
        """Whether both scorers pack keys to the same numbers."""
        mine, theirs = (self.dims, self.mean_key), (other.dims, other.mean_key)
        return self.dtype == other.dtype and all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a.cpu(), b.cpu()))
            for a, b in zip(mine, theirs, strict=True)
        )

    def pack(self, key: Tensor) -> Tensor:
        """Take ``key`` [B, Hkv, T, D] at ``dims``, less the mean key: [B, Hkv, T, 2 * n_tip], contiguous."""
        rows = _take_dims(key, self.dims)
        if self.mean_key is None:
            return rows
        mean = self.mean_key.gather(-1, self.dims).to(rows)
        return rows - (keep_rounding(mean) if torch.compiler.is_compiling() else mean)[:, None]

    def of_query(self, query: Tensor) -> Tensor:
        """Take ``query`` [B, Hq, Q, D] at ``dims``, times ``weights``: [B, Hkv, G * Q, 2 * n_tip]."""
        batch, _, _, head_dim = query.shape
        query_dims = _take_dims(query.reshape(batch, len(self.dims), -1, head_dim), self.dims)
        return query_dims if self.weights is None else query_dims * self.weights.to(query_dims)[:, None]

    def shift(self, query: Tensor) -> Tensor | None:
        """Compute ``q . m`` of ``query`` [B, Hq, Q, D]: float32 [B, Hkv, G * Q, 1]; None without a mean key."""
        if self.mean_key is None:
            return None
        grouped = query.reshape(query.shape[0], len(self.mean_key), -1, query.shape[3])
        return dot_products(grouped, self.mean_key.to(grouped)[None, :, None].expand(len(query), -1, -1, -1))

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
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
            scores = dot_products(self.of_query(query), self.pack(key.repeat_interleave(group, dim=1)))
        return scores.view(batch, kv_heads, group, q_len, kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """A query reads ``2 n_tip`` dimensions of each key, once per query head if heads have their own chunks."""
        heads, width = self.dims.shape
        return ReadShare(ranking=min(0.5, heads // kv_heads * width / (2 * head_dim)))

    def reads_packed(self, head_dim: int, dtype: torch.dtype) -> float:
        """As `Scorer`."""
        return packed_bytes(self.dims.shape[1], self.dtype, dtype) / (2 * head_dim * dtype.itemsize)


def _take_dims(states: Tensor, dims: Tensor) -> Tensor:
    """Take [B, H, T, D] at ``dims`` [H, P]; not by `torch.take_along_dim`, for which Dynamo makes T a constant."""
    batch, _, length, _ = states.shape
    return states.gather(-1, dims.to(states.device)[None, :, None].expand(batch, -1, length, -1))
