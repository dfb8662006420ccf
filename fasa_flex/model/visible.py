"""Which keys the queries of one forward may attend to, and what follows from it for every layer alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.selection import Marks
from fasa_flex.hf.masks import Shape, count_valid, last_valid, valid_from_mask, valid_numbers
from fasa_flex.model.stats import tally


class Decoding(NamedTuple):
    """One decode step under one budget.

    Attributes:
        over: bool [B, 1], the rows with more valid keys than the budget; None: no row can have more.
        marks: forced and sampled keys; None where no row is over budget.
        counts: `tally` of the step.
    """

    over: Tensor | None
    marks: Marks | None
    counts: Tensor


class Visible:
    """The valid keys of one forward's queries.

    Sums and comparisons of a mask cost a kernel launch each, and all layers of a decode step have the same mask: what
    is computed here is computed once for them.

    Attributes:
        mask: as for `valid_from_mask`.
        shape: B, Q and T.
        device: of the tensors made here.
        n_valid: int64 [B, Q], valid keys of each query.
        dense_counts: `tally` of queries that are all dense.
    """

    def __init__(self, mask: Tensor | None, shape: Shape, device: torch.device) -> None:
        self.mask, self.shape, self.device = mask, shape, device
        self.n_valid = count_valid(mask, shape, device)
        self.dense_counts = tally(self.n_valid)
        self.keys: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._decoding: dict[tuple[Budget, bool], Decoding] = {}

    def valid(self) -> Tensor:
        """Which keys each query may attend to: bool [B or 1, 1, 1, Q, T]."""
        if self.keys is None:
            self.keys = valid_from_mask(self.mask, self.shape, self.device)
        return self.keys

    def last(self) -> tuple[Tensor, Tensor]:
        """The last query's valid keys, bool [B or 1, T], and how many there are up to each slot, int64 [B or 1, T]."""
        if self._last is None:
            given = (self.mask, self.shape, self.device)
            self._last = last_valid(*given), valid_numbers(*given)
        return self._last

    def decoding(self, budget: Budget, samples: bool) -> Decoding:
        """A step of one query a row under ``budget``; ``samples``: whether weights are relative to sampled keys."""
        if torch.compiler.is_compiling():
            return self._decode(budget, samples)
        known = self._decoding.get((budget, samples))
        if known is None:
            known = self._decoding[budget, samples] = self._decode(budget, samples)
        return known

    def _decode(self, budget: Budget, samples: bool) -> Decoding:
        if budget.covers(self.shape[2]):
            return Decoding(None, None, self.dense_counts)
        over = budget.exceeded(self.n_valid)
        return Decoding(over, Marks.of(self.valid(), budget, samples), tally(self.n_valid, over, budget))
