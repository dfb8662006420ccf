"""What a sparse query reads: the one definition of KV bytes, by which all methods are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class ReadShare:
    """Bytes of a layer's keys and values that a query reads, in units of one token's key and value in one head.

    Whatever a method reads to rank keys counts, in the form in which it keeps it: packed keys, page bounds, labels.
    So does what it reads of the keys that were not selected, to complete attention. What it writes, and a score for
    each key, does not. The query heads of a group read once what they share.

    Attributes:
        ranking: for each valid key, to rank it.
        rows: for each selected key: 1 for its key and value, less where ranking has read some of it.
        together: whether the query heads of a group always share one selection, whatever is asked of the others.
        state: once, whatever the keys: the completion's mean value and covariance.
    """

    ranking: float
    rows: float = 1.0
    together: bool = False
    state: float = 0.0

    def of(self, n_selected: float, n_valid: float, n_queries: int = 1) -> float:
        """Share read of ``n_valid`` keys and values, at most 1: then as dense.

        Args:
            n_selected: keys that are attended to, summed over queries.
            n_valid: keys that they were chosen from, likewise.
            n_queries: how many queries that were.
        """
        if not n_valid:
            return 1.0
        return min(1.0, self.ranking + (self.rows * n_selected + self.state * n_queries) / n_valid)

    def completed(self, head_dim: int, first_order: bool) -> ReadShare:
        """With a completion's state: a mean value, and for a first-order one ``head_dim`` of its kind, the covariance.

        All in the cache's precision, as half a token's key and value each.
        """
        return replace(self, state=(1 + head_dim * first_order) / 2)

    def by_head(self, group: int) -> ReadShare:
        """Where the G query heads of a group select each for itself; taken to share no row, which is the most."""
        return self if self.together else replace(self, rows=self.rows * group)


@runtime_checkable
class StatesReads(Protocol):
    """A scorer that states what a query reads, for one selection in each key/value head."""

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """In units of a token's key and value, ``2 * head_dim`` numbers."""
        ...
