"""How the tokens of a packed forward attend: requests that are computed together, and requests that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.selection import Marks
from fasa_flex.hf.continuous_batching import Request
from fasa_flex.paged.book import on_device

Places = slice | Tensor
"""Places in a dimension: a slice, which makes a view, or int64 [B]."""


@dataclass(frozen=True, eq=False)
class Group:
    """Requests with one new token each, which are computed together.

    Attributes:
        rows: places of B requests in the forward.
        tokens: places of their tokens in the packed row.
        lengths: int64 [B], number of keys of each.
        longest: number of keys of the longest.
    """

    rows: Places
    tokens: Places
    lengths: Tensor
    longest: int
    _valid: dict[int, Tensor] = field(default_factory=dict)
    _marks: dict[tuple[int, Budget, bool], Marks] = field(default_factory=dict)

    @classmethod
    def of(cls, requests: Sequence[Request], rows: Sequence[int], lengths: Tensor) -> Group | None:
        """Make a group of the ``requests`` at these ``rows``; None: there are none.

        Args:
            requests: requests of the forward.
            rows: places in it, ascending.
            lengths: int64 [R], number of keys of every request.
        """
        if not rows:
            return None
        chosen = [requests[row] for row in rows]
        places, tokens = (_places(each, lengths.device) for each in (rows, [each.start for each in chosen]))
        return cls(places, tokens, lengths[places], max(each.end for each in chosen))

    def valid(self, kv_len: int | None = None) -> Tensor:
        """The keys of each request among the first ``kv_len``, bool [B, 1, 1, 1, T]; None: the longest's."""
        kv_len = kv_len or self.longest
        if kv_len not in self._valid:
            within = torch.arange(kv_len, device=self.lengths.device) < self.lengths[:, None]
            self._valid[kv_len] = within[:, None, None, None]
        return self._valid[kv_len]

    def marks(self, kv_len: int, budget: Budget, samples: bool) -> Marks:
        """Forced and sampled keys among the first ``kv_len``; layers with the same budget share them."""
        key = kv_len, budget, samples
        if key not in self._marks:
            self._marks[key] = Marks.of(self.valid(kv_len), budget, samples)
        return self._marks[key]


def _places(numbers: Sequence[int], device: torch.device) -> Places:
    """Ascending numbers as places: a slice if they follow each other."""
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return on_device(torch.tensor(numbers), device)


class Parts(NamedTuple):
    """How the tokens of a forward attend under one budget.

    Attributes:
        decoding: requests whose one token is sparse; None: there are none.
        short: requests with one token whose keys the budget covers; None: there are none.
        alone: other requests, by their row: parts of prompts, and generated tokens that are computed again.
        first_sparse: number of the first sparse token of those of ``alone`` that have one, by their row.
        sparse: bool [1, N] on the host, the tokens that attend to a selection.
    """

    decoding: Group | None
    short: Group | None
    alone: dict[int, Request]
    first_sparse: dict[int, int]
    sparse: Tensor
