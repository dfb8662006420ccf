"""How many tokens a query attends to, and which are forced in (the paper's N_fac)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The tokens of one query.

    Attributes:
        n_fac: an int counts tokens, a float in (0, 1] is a share of the query's valid keys, rounded up.
        n_sink: first valid tokens that are always selected, inside the budget.
        n_recent: last valid tokens that are always selected, inside the budget.

    Raises:
        ValueError: no positive count or share in (0, 1], or fewer tokens than are forced.
    """

    n_fac: int | float
    n_sink: int = 0
    n_recent: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n_fac, float):
            if not 0.0 < self.n_fac <= 1.0:
                raise ValueError(f"n_fac as a share must lie in (0, 1], got {self.n_fac}; an int counts tokens.")
        else:
            check_count("n_fac", self.n_fac, 1)
        check_count("n_sink", self.n_sink, 0)
        check_count("n_recent", self.n_recent, 0)
        if not isinstance(self.n_fac, float) and self.n_sink + self.n_recent > self.n_fac:
            raise ValueError(
                f"n_sink + n_recent = {self.n_sink + self.n_recent} exceeds the budget n_fac = {self.n_fac}; "
                "forced tokens count inside the budget, so raise n_fac or force fewer."
            )

    def of(self, n_valid: Tensor) -> Tensor:
        """Tokens that queries with ``n_valid`` keys (int64) attend to, shaped alike: min(n_fac, n_valid)."""
        if isinstance(self.n_fac, int):
            return n_valid.clamp(max=self.n_fac)
        allowed: Tensor = _share_of(n_valid, self.n_fac)
        return allowed

    def widest(self, kv_len: int) -> int:
        """The most that a query among ``kv_len`` keys may take: the static width of `Selection.slots`."""
        if isinstance(self.n_fac, int):
            return min(self.n_fac, kv_len)
        widest: int = _share_of(kv_len, self.n_fac)
        return widest


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
