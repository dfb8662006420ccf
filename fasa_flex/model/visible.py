"""Valid keys of one forward's queries, and masks and counts that all layers derive from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.budget import Budget
from fasa_flex.core.selection import Marks
from fasa_flex.hf.masks import Shape, count_valid, last_valid, valid_from_mask, valid_numbers
from fasa_flex.model.stats import tally


class Decoding(NamedTuple):
    """Masks and counts of one decode step under one budget.

    Attributes:
        over: bool [B, 1], the batch rows with more valid keys than the budget; None: the budget covers every slot.
        marks: forced and sampled keys; None if ``over`` is None.
        counts: `tally` of the step.
    """

    over: Tensor | None
    marks: Marks | None
    counts: Tensor


class Visible:
    """The valid keys of one forward's queries.

    Each sum or comparison of a mask is a kernel launch. All layers of a decode step have the same mask, so that this
    object computes them once.

    Attributes:
        mask: mask of the attention call, as in `valid_from_mask`.
        shape: B, Q and T.
        device: device of the tensors.
        n_valid: int64 [B, Q], number of valid keys of each query.
        dense_counts: `tally` of the forward if every query is dense.
    """

    def __init__(self, mask: Tensor | None, shape: Shape, device: torch.device) -> None:
        self.mask, self.shape, self.device = mask, shape, device
        self.n_valid = count_valid(mask, shape, device)
        self.dense_counts = tally(self.n_valid)
        self.keys: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._decoding: dict[tuple[Budget, bool], Decoding] = {}

    def valid(self) -> Tensor:
        """Return the keys that each query may attend to: bool [B or 1, 1, 1, Q, T]."""
        if self.keys is None:
            self.keys = valid_from_mask(self.mask, self.shape, self.device)
        return self.keys

    def last(self) -> tuple[Tensor, Tensor]:
        """Return the last query's valid keys, bool [B or 1, T], and their running count, int64 [B or 1, T]."""
        if self._last is None:
            inputs = (self.mask, self.shape, self.device)
            self._last = last_valid(*inputs), valid_numbers(*inputs)
        return self._last

    def decoding(self, budget: Budget, samples: bool) -> Decoding:
        """Return masks and counts of a decode step under ``budget``; ``samples``: whether to mark sampled keys."""
        if torch.compiler.is_compiling():
            return self._decode(budget, samples)
        step = self._decoding.get((budget, samples))
        if step is None:
            step = self._decoding[budget, samples] = self._decode(budget, samples)
        return step

    def _decode(self, budget: Budget, samples: bool) -> Decoding:
        if budget.covers(self.shape[2]):
            return Decoding(None, None, self.dense_counts)
        over = budget.exceeded(self.n_valid)
        marks = Marks.of(self.valid(), budget, samples, lambda: self.last()[1][:, None, None, None])
        return Decoding(over, marks, tally(self.n_valid, over, budget))
