"""The base of methods that evict: a dropped key cannot be selected again.

Dense queries drop no keys. Before a sparse query, a head drops keys until one less than the budget is left, ranked by
the earlier queries; with its own key the query then attends to as many keys as the budget.
"""

from __future__ import annotations

import copy
import itertools
import threading
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.backends.gather import take_rows
from fasa_flex.baselines.scorers import group_scores
from fasa_flex.core import pieces
from fasa_flex.core.budget import Budget
from fasa_flex.core.ranking import INVALID, rank_keys
from fasa_flex.core.scoring import Forward, SequenceScorer
from fasa_flex.errors import NotSupportedError, StateError

ABSENT = -1
"""In place of a slot: padding, or a head with fewer kept keys than another."""

_numbers, _alone = itertools.count(), threading.Lock()


class Evicting(SequenceScorer):
    """A scorer that keeps a subset of the keys, for causal masks with or without padding.

    Each cache has its own state (`of`), so that several sequences can be continued in turn or in threads. Forced tokens
    (``n_sink``, ``n_recent``) are never dropped. A group's query heads share one selection. Attention weights are taken
    to be a plain softmax, without cap and learned sinks.

    Attributes:
        kept: int64 [B, Hkv, K], slots of each head's kept keys, ascending; `ABSENT` in front if a head keeps fewer.
    """

    kept: Tensor

    def __init__(self) -> None:
        self._number, self._length = next(_numbers), 0
        self._last_key: Tensor | None = None

    @abstractmethod
    def begin(self, forward: Forward) -> None:
        """Start a new sequence."""

    @abstractmethod
    def observe(self, query: Tensor, slots: Tensor, key: Tensor, scaling: float) -> None:
        """Update the state by queries [B, Hq, q, D], with kept keys, at ``slots`` int64 [B, q] (padding: ABSENT)."""

    @abstractmethod
    def recent(self, allowed: Tensor) -> Tensor:
        """Number of latest kept keys that are not dropped, int64 [B, Hkv], for the budget ``allowed`` [B, Hkv]."""

    @abstractmethod
    def rank(self, key: Tensor, recent: Tensor, scaling: float) -> Tensor:
        """Scores of the kept keys, float32 [B, Hkv, K]; the ``recent`` int64 [B, Hkv] latest stay anyway."""

    def follow(self, forward: Forward) -> Tensor:
        """As `SequenceScorer`: 0 for kept keys, -inf for the others.

        Raises:
            NotImplementedError: called under torch.compile, which cannot keep the state.
            RuntimeError: a forward that does not continue the former one.
            ValueError: forced tokens that fill the budget.
        """
        if torch.compiler.is_compiling():
            raise NotSupportedError(
                f"{type(self).__name__} remembers dropped keys and does not compile; run the model eagerly."
            )
        if forward.cache is None:
            with _alone:
                return self._follow(forward)
        return self.of(forward.cache)._follow(forward)

    def of(self, cache: object) -> Evicting:
        """The copy of this scorer with a cache's state, stored on the cache, so that copies of a cache include it."""
        followers: dict[int, Evicting] = vars(cache).setdefault("_fasa_followers", {})
        if self._number not in followers:
            followers[self._number] = copy.deepcopy(self)
        return followers[self._number]

    def _follow(self, forward: Forward) -> Tensor:
        self._continue(forward)
        key, (batch, kv_heads, kv_len, _) = forward.key.contiguous(), forward.key.shape
        q_len = forward.query.shape[2]
        at = forward.first_slot + torch.arange(q_len, device=key.device)
        own = forward.valid[:, 0, 0].expand(batch, -1, -1)[:, at - forward.first_slot, at]
        slots = torch.where(own, at, ABSENT)
        allowed = forward.budget.of(forward.valid.sum(-1)).expand(batch, kv_heads, 1, -1)[:, :, 0]
        sparse = forward.sparse & own
        size = (batch, kv_heads, 1, q_len - forward.first, kv_len + 1)
        scores = torch.full(size, -torch.inf, dtype=torch.float32, device=key.device)
        for start, stop, drops in _blocks(sparse.any(0).tolist()):
            if drops:
                self._make_room(forward, key, allowed[..., start], sparse[:, start, None])
            self._keep(slots[:, start:stop])
            self.observe(forward.query[:, :, start:stop], slots[:, start:stop], key, forward.scaling)
            if drops:
                present = torch.where(self.kept == ABSENT, kv_len, self.kept)
                scores[:, :, 0, start - forward.first].scatter_(-1, present, 0.0)
        return scores[..., :kv_len]

    def _continue(self, forward: Forward) -> None:
        batch, kv_heads = forward.key.shape[:2]
        if forward.first_slot == 0:
            self.kept = torch.empty(batch, kv_heads, 0, dtype=torch.long, device=forward.key.device)
            self.begin(forward)
        elif (
            self._last_key is None
            or forward.first_slot != self._length
            or not torch.equal(self._last_key, forward.key[:, :, self._length - 1])
        ):
            raise StateError(
                f"{type(self).__name__} has followed {self._length} slots, but the cache's {forward.first_slot} are "
                "others, and dropped keys cannot come back; begin the sequence anew, without beam search, assisted "
                "generation or a cropped cache."
            )
        self._length = forward.first_slot + forward.query.shape[2]
        self._last_key = forward.key[:, :, self._length - 1].clone()

    def _make_room(self, forward: Forward, key: Tensor, allowed: Tensor, sparse: Tensor) -> None:
        """Keep ``allowed - 1`` keys, int64 [B, Hkv], in rows that are ``sparse`` bool [B, 1]; `kept` is unsorted."""
        budget, width = forward.budget, self.kept.shape[-1]
        keep = torch.where(sparse, allowed - 1, width)
        if width <= int(keep.min()):
            return
        _check_forced(budget, int(keep.min()) + 1)
        present = self.kept != ABSENT
        column = torch.arange(width, device=keep.device)
        nth = column - (~present).sum(-1, keepdim=True)
        sinks, latest_forced = budget.forced(int(keep.min()) + 1)
        forced = (nth < sinks) | (column >= width - max(0, latest_forced - 1))
        recent = self.recent(allowed)
        latest = torch.finfo(torch.float32).max * ((column + 1) / width)  # above other scores, later keys higher
        scores = self.rank(key, recent, forward.scaling)
        scores = torch.where(column >= width - recent[..., None], latest, scores)
        order = torch.where(present, rank_keys(scores, first=forced), INVALID)
        best = order.topk(int(keep.clamp(max=width).max()), dim=-1)
        taken = (best.values > INVALID) & (torch.arange(best.values.shape[-1], device=keep.device) < keep[..., None])
        self.kept = torch.where(taken, self.kept.gather(-1, best.indices), ABSENT)

    def _keep(self, slots: Tensor) -> None:
        """Add the keys at ``slots`` int64 [B, q]."""
        new = slots[:, None].expand(-1, self.kept.shape[1], -1)
        self.kept = torch.cat([self.kept, new], dim=-1).sort(-1).values
        most = int((self.kept != ABSENT).sum(-1).max())
        self.kept = self.kept[..., self.kept.shape[-1] - most :]


class Window:
    """The last real queries of every row, SnapKV's observation window.

    Args:
        size: W, number of queries.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def begin(self, query: Tensor) -> None:
        """Empty the window; ``query`` [B, Hq, Q, D] is of the new sequence."""
        batch, heads, _, dim = query.shape
        self.query = query.new_zeros(batch, heads, self.size, dim)
        self.slots = torch.full((batch, self.size), ABSENT, device=query.device)

    def add(self, query: Tensor, slots: Tensor) -> None:
        """Add queries [B, Hq, q, D] at ``slots`` int64 [B, q], ABSENT for padding."""
        last = torch.cat([self.slots, slots], dim=1).topk(self.size)
        self.slots, rows = last.values.flip(1), last.indices.flip(1)
        rows = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        self.query = torch.cat([self.query, query], dim=2).gather(2, rows)

    def sees(self, recent: Tensor) -> Tensor:
        """Mask of the queries in each head's window of ``recent`` int64 [B, Hkv] queries: bool [B, Hkv, W]."""
        number = torch.arange(self.size, device=recent.device)
        return (number >= self.size - recent[..., None]) & (self.slots[:, None] != ABSENT)


def kept_keys(key: Tensor, kept: Tensor) -> Tensor:
    """Rows of ``key`` [B, Hkv, T, D] at the slots ``kept`` [B, Hkv, K], any row for ABSENT: [B, Hkv, K, D]."""
    return take_rows(key, kept.clamp(min=0)[:, :, None, None])


def attention_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled dot products of queries [B, Hq, q, D] with kept keys [B, Hkv, K, D]: float32 [B, Hkv, G, q, K]."""
    return group_scores(query, key) * scaling


def seen(kept: Tensor, slots: Tensor) -> Tensor:
    """Causal mask of kept keys [B, Hkv, K] for queries at ``slots`` [B, q]: bool [B, Hkv, 1, q, K]; padding: False."""
    keys = kept[:, :, None, None]
    return (keys != ABSENT) & (keys <= slots[:, None, None, :, None])


def softmax_over(logits: Tensor, allowed: Tensor) -> Tensor:
    """Attention weights over the ``allowed`` keys, all 0 if there is none."""
    return torch.where(allowed, logits, -torch.inf).softmax(-1).nan_to_num(0.0)


def max_pool(scores: Tensor, kernel: int) -> Tensor:
    """Maximum over ``kernel`` neighbours centred on each score: [B, H, K], as ``scores``."""
    return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def rows_that_fit(width: int) -> int:
    """Number of rows of ``width`` float32 numbers that are computed at one time."""
    return pieces.rows_that_fit(4 * width)


def _blocks(stepped: list[bool]) -> Iterator[tuple[int, int, bool]]:
    """Ranges [start, stop) of queries observed together, and whether keys are dropped: a sparse query is alone."""
    start = 0
    while start < len(stepped):
        stop = start + 1
        while not stepped[start] and stop < len(stepped) and not stepped[stop]:
            stop += 1
        yield start, stop, stepped[start]
        start = stop


def _check_forced(budget: Budget, allowed: int) -> None:
    sinks, recent = budget.forced(allowed)
    if sinks + max(1, recent) > allowed:
        raise ValueError(
            f"n_sink = {sinks} and n_recent = {recent} leave no room in a budget of {allowed} for the "
            "query's own key, which a method that evicts always keeps; force fewer or raise n_fac."
        )
