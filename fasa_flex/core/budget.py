"""How many tokens a query attends to, and which are forced in (the paper's N_fac)."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SINKS, RECENT = 4, 32
"""Default numbers of forced first and last valid tokens; at most an eighth and a half of the budget.

Measured on SmolLM2-135M with a budget of 256 of 8192 tokens: forcing them lowers the perplexity of the paper's
selection from 1.144 to 1.041 times that of dense attention.
"""


@dataclass(frozen=True)
class Budget:
    """How many keys one query attends to.

    Attributes:
        n_fac: an int is a number of tokens; a float in (0, 1] is a share of the query's valid keys, rounded up; a tuple
            holds a number of tokens for each key/value head.
        n_sink: number of first valid tokens that are always selected and count towards ``n_fac``; None: 4, or an eighth
            of a budget below 32.
        n_recent: number of last valid tokens that are always selected and count towards ``n_fac``; None: 32, or half of
            a budget below 64.
        shard: rank and number of ranks of a tensor-parallel model. ``n_fac`` counts for all heads, and so do `total`,
            `exceeded`, `covers` and `widest`, which thus agree on all ranks; `of` is for the rank's own heads.

    Raises:
        ValueError: ``n_fac`` is neither a positive count nor a share in (0, 1], or is less than the forced tokens.
    """

    n_fac: int | float | tuple[int, ...]
    n_sink: int | None = 0
    n_recent: int | None = 0
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        counts = self.n_fac if isinstance(self.n_fac, tuple) else (self.n_fac,)
        plain = tuple(map(plain_number, counts))
        object.__setattr__(self, "n_fac", plain[0] if len(plain) == 1 else plain)  # one count serves all heads
        for name in ("n_sink", "n_recent"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if isinstance(self.n_fac, float):
            if not 0.0 < self.n_fac <= 1.0:
                raise ValueError(f"n_fac as a share must lie in (0, 1], got {self.n_fac}; an int counts tokens.")
        else:
            if not self._counts:
                raise ValueError("n_fac must name a count for each key/value head, got none; give at least one.")
            for count in self._counts:
                check_count("n_fac", count, 1)
        for name in ("n_sink", "n_recent"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0)
        for count in () if isinstance(self.n_fac, float) else self._counts:
            if sum(self.forced(count)) > count:
                raise ValueError(
                    f"n_sink + n_recent = {sum(self.forced(count))} exceeds the budget n_fac = {count}; "
                    "forced tokens count inside the budget, so raise n_fac or force fewer."
                )

    @classmethod
    def stated(cls, n_fac: int | float, n_sink: int | None, n_recent: int | None) -> Budget:
        """Make a budget from a user's settings; `fasa_flex.core.layer_budgets` spreads it over layers and heads.

        Raises:
            ValueError: ``n_fac`` is a tuple, or the class refuses the values.
        """
        if not isinstance(plain_number(n_fac), int | float):
            raise ValueError(
                f"n_fac must be one number, got {n_fac!r}; FasaConfig(layer_budgets=...) weighs layers and heads."
            )
        return cls(n_fac, n_sink, n_recent)

    @property
    def _counts(self) -> tuple[Any, ...]:
        return self.n_fac if isinstance(self.n_fac, tuple) else (self.n_fac,)

    @property
    def _own_counts(self) -> tuple[Any, ...]:
        (rank, ranks), counts = self.shard, self._counts
        return counts[rank * len(counts) // ranks : (rank + 1) * len(counts) // ranks]

    @property
    def heads(self) -> int:
        """Number of key/value heads with a count of their own; 1 if all heads share one budget."""
        return len(self._counts)

    @property
    def is_count(self) -> bool:
        """Whether ``n_fac`` is one count for all heads, so that queries with enough keys attend to equally many."""
        return isinstance(self.n_fac, int)

    @property
    def trillionths(self) -> int:
        """The largest part of a query's valid keys that it attends to, in trillionths; all of them for a count."""
        return _trillionths(self.n_fac) if isinstance(self.n_fac, float) else 10**12

    def of(self, n_valid: Tensor) -> Tensor:
        """Number of tokens that each query attends to: min(n_fac, n_valid).

        Args:
            n_valid: int64 [B, 1, 1, Q], number of valid keys of each query; any shape if all heads share one budget.

        Returns:
            int64 in the shape of ``n_valid``, or [B, Hkv, 1, Q] if heads have budgets of their own.
        """
        if isinstance(self.n_fac, float):
            allowed: Tensor = _share_of(n_valid, self.n_fac)
            return allowed
        if isinstance(self.n_fac, int):
            return n_valid.clamp(max=self.n_fac)
        return _up_to(self._own_counts, n_valid)

    def forced(self, allowed: Any) -> tuple[Any, Any]:
        """Numbers of first and of last valid keys that are selected whatever their scores.

        Args:
            allowed: number of tokens that queries attend to, int or int64 tensor.

        Returns:
            two numbers; one that defaults to a fraction of a tensor ``allowed`` is a tensor of its shape.
        """
        least = torch.clamp if isinstance(allowed, Tensor) else _at_most
        sinks = least(allowed // 8, max=SINKS) if self.n_sink is None else self.n_sink
        recent = least(allowed // 2, max=RECENT) if self.n_recent is None else self.n_recent
        return sinks, recent

    def total(self, n_valid: Tensor) -> Tensor:
        """Number of tokens that queries attend to, summed over `heads`: int64 in the shape of ``n_valid`` [B, Q]."""
        if not isinstance(self.n_fac, tuple):
            return self.of(n_valid)
        return _up_to(self.n_fac, n_valid[:, None, None]).sum((1, 2))

    def exceeded(self, n_valid: Tensor) -> Tensor:
        """Whether the valid keys exceed the budget of any head: bool in the shape of ``n_valid``, int64 [B, Q]."""
        return min(self._counts) < n_valid if not isinstance(self.n_fac, float) else self.of(n_valid) < n_valid

    def widest(self, kv_len: int) -> int:
        """Largest number of keys that a query may select from ``kv_len``: the static width of `Selection.slots`."""
        if isinstance(self.n_fac, int):
            return min(self.n_fac, kv_len)
        if not isinstance(self.n_fac, float):
            most: int = max(self._counts)
            return min(most, kv_len)
        widest: int = _share_of(kv_len, self.n_fac)
        return widest

    def covers(self, kv_len: int) -> bool:
        """Whether the budget of every head is at least ``kv_len`` keys, so that attention is dense."""
        return (min(self.n_fac) if isinstance(self.n_fac, tuple) else self.widest(kv_len)) >= kv_len

    def of_head(self, head: int) -> Budget:
        """The budget of one key/value head of the rank."""
        return replace(self, n_fac=self._own_counts[head]) if isinstance(self.n_fac, tuple) else self


def _up_to(counts: tuple[int, ...], n_valid: Tensor) -> Tensor:
    """The least of each head's count and ``n_valid``, int64 [B, 1, 1, Q]: int64 [B, heads, 1, Q]."""
    return torch.cat([n_valid.clamp(max=count) for count in counts], dim=1)  # no copy to the device


def _at_most(value: int, max: int) -> int:  # noqa: A002 - the name of torch.clamp's argument
    return min(value, max)


def plain_number(value: Any) -> Any:
    """Convert a NumPy number to a Python int or float; return anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_count(name: str, value: object, least: int) -> None:
    """Refuse a value that is not a Python or NumPy integer of at least ``least``."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _share_of(keys: Any, share: float) -> Any:
    """Compute ``share * keys`` (int or int64 tensor), rounded up, in integer arithmetic.

    The share is lowered by 1e-12 first, so that binary rounding adds no key: 7 % of 100 keys are 7, although
    0.07 * 100 exceeds 7 in binary.
    """
    return -(-keys * _trillionths(share) // 10**12)


def _trillionths(share: float) -> int:
    return max(round(share * 10**12) - 1, 1)
