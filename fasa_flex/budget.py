"""How many tokens a query attends to, and which are forced in (the paper's N_fac)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The tokens of one query.

    Attributes:
        n_fac: an int counts tokens, a float in (0, 1] is a share of the query's valid keys, rounded up; a tuple counts
            the tokens of each key/value head.
        n_sink: first valid tokens that are always selected, inside the budget.
        n_recent: last valid tokens that are always selected, inside the budget.

    Raises:
        ValueError: no positive count or share in (0, 1], or fewer tokens than are forced.
    """

    n_fac: int | float | tuple[int, ...]
    n_sink: int = 0
    n_recent: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n_fac, float):
            if not 0.0 < self.n_fac <= 1.0:
                raise ValueError(f"n_fac as a share must lie in (0, 1], got {self.n_fac}; an int counts tokens.")
        else:
            if not self._counts:
                raise ValueError("n_fac must name a count for each key/value head, got none; give at least one.")
            for count in self._counts:
                check_count("n_fac", count, 1)
        check_count("n_sink", self.n_sink, 0)
        check_count("n_recent", self.n_recent, 0)
        if not isinstance(self.n_fac, float) and self.n_sink + self.n_recent > min(self._counts):
            raise ValueError(
                f"n_sink + n_recent = {self.n_sink + self.n_recent} exceeds the budget n_fac = {self.n_fac}; "
                "forced tokens count inside the budget, so raise n_fac or force fewer."
            )

    @property
    def _counts(self) -> tuple[Any, ...]:
        return self.n_fac if isinstance(self.n_fac, tuple) else (self.n_fac,)

    @property
    def heads(self) -> int:
        """Key/value heads that have counts of their own; 1 where heads do not differ."""
        return len(self._counts)

    @property
    def is_count(self) -> bool:
        """Whether every query with enough keys attends to the same number of them, whatever its head and keys."""
        return isinstance(self.n_fac, int)

    def of(self, n_valid: Tensor) -> Tensor:
        """Tokens that queries attend to: min(n_fac, n_valid).

        Args:
            n_valid: int64 [B, 1, 1, Q], valid keys of each query; any shape where heads do not differ.

        Returns:
            int64, shaped as ``n_valid``; [B, Hkv, 1, Q] where heads differ.
        """
        if isinstance(self.n_fac, float):
            allowed: Tensor = _share_of(n_valid, self.n_fac)
            return allowed
        if isinstance(self.n_fac, int):
            return n_valid.clamp(max=self.n_fac)
        return torch.cat([n_valid.clamp(max=count) for count in self.n_fac], dim=1)  # copies nothing to the device

    def total(self, n_valid: Tensor) -> Tensor:
        """Tokens that queries attend to, summed over `heads`: int64, shaped as ``n_valid`` int64 [B, Q]."""
        if not isinstance(self.n_fac, tuple):
            return self.of(n_valid)
        return self.of(n_valid[:, None, None]).sum((1, 2))

    def exceeded(self, n_valid: Tensor) -> Tensor:
        """Whether any head has more keys than it may attend to: bool, shaped as ``n_valid`` int64 [B, Q]."""
        return min(self._counts) < n_valid if not isinstance(self.n_fac, float) else self.of(n_valid) < n_valid

    def widest(self, kv_len: int) -> int:
        """The most that a query among ``kv_len`` keys may take: the static width of `Selection.slots`."""
        if not isinstance(self.n_fac, float):
            most: int = max(self._counts)
            return min(most, kv_len)
        widest: int = _share_of(kv_len, self.n_fac)
        return widest

    def covers(self, kv_len: int) -> bool:
        """Whether a query among ``kv_len`` keys attends to all of them in every head."""
        return (self.widest(kv_len) if isinstance(self.n_fac, float) else min(self._counts)) >= kv_len

    def of_head(self, head: int) -> Budget:
        """That of one key/value head."""
        return replace(self, n_fac=self.n_fac[head]) if isinstance(self.n_fac, tuple) else self


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _share_of(keys: Any, share: float) -> Any:
    """``share`` of ``keys`` (int or int64 tensor) rounded up, in integers.

    The share is taken a trillionth lower, so that it means the number that was written: 7 % of 100 keys are 7, although
    0.07 * 100 exceeds 7 in binary.
    """
    trillionths = max(round(share * 10**12) - 1, 1)
    return -(-keys * trillionths // 10**12)
