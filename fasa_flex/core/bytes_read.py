"""Bytes of keys and values that a sparse query reads, defined once for all methods under comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ReadShare:
    """Bytes that a query reads in a layer; the unit is the size of one token's key and value in one head.

    Counted are the data that a method reads to rank keys, in their stored form (packed keys, page bounds, labels), and
    the data of unselected keys that it reads for the completion. Writes and the scores themselves are not counted. Data
    that the query heads of a group share counts once.

    Attributes:
        ranking: read to rank, per valid key.
        rows: read to attend, per selected key: 1 for its key and value, less if the ranking has read a part of it.
        together: whether the query heads of a group share one selection under every ``group_reduce``.
        state: read once per query, whatever the number of keys: mean value and covariance of the completion.
    """

    ranking: float
    rows: float = 1.0
    together: bool = False
    state: float = 0.0

    def of(self, n_selected: float, n_valid: float, n_queries: int = 1) -> float:
        """Bytes read as a share of the bytes that dense attention reads; at most 1.

        Args:
            n_selected: number of keys attended to, summed over queries.
            n_valid: number of valid keys, summed over queries.
            n_queries: number of queries.
        """
        if not n_valid:
            return 1.0
        return min(1.0, self.ranking + (self.rows * n_selected + self.state * n_queries) / n_valid)

    def completed(self, head_dim: int, first_order: bool) -> ReadShare:
        """Add the completion's state: the mean value and, for a first-order one, the covariance.

        In the cache's precision the mean value takes 0.5 units, as one value does, and the covariance ``head_dim / 2``.
        """
        return replace(self, state=(1 + head_dim * first_order) / 2)

    def by_head(self, group: int) -> ReadShare:
        """Bytes if each of the G query heads selects for itself: an upper bound, with no selected row in common."""
        return self if self.together else replace(self, rows=self.rows * group)
