"""The rows that the last decode step selected, kept on the device: the next one fetches only new rows (FASA-M)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResidentRows:
    """Rows of one layer's keys and values; `fasa_flex.backends.triton.decode.hold_slots` keeps them.

    From one step to the next a query's selection changes in part only, so what was selected last is the prefetch: it
    is there when the step begins, and the difference is fetched.

    Attributes:
        slots: int32 [B, Hkv, N], which are held, ascending; -1 for none.
        places: int32 [B, Hkv, N], at which row each is held: every number below N once.
        keys: float [B, Hkv, N, D], the rows.
        values: likewise, [B, Hkv, N, Dv].
        length: int64 scalar, the tokens of a static cache, which can be rewound unnoticed; None: of a growing one.
    """

    slots: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor | None = None

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, count: int, length: Tensor | None = None) -> ResidentRows:
        """Room for ``count`` rows a key/value head of states such as ``key`` and ``value`` [B, Hkv, t, D]."""
        slots = torch.full((*key.shape[:2], count), -1, dtype=torch.int32, device=key.device)
        places = torch.arange(count, dtype=torch.int32, device=key.device).expand_as(slots).contiguous()
        keys, values = (states.new_zeros(*states.shape[:2], count, states.shape[3]) for states in (key, value))
        if not torch.compiler.is_compiling():
            for held in (slots, places, keys, values):
                torch._dynamo.mark_static_address(held)
        return cls(slots, places, keys, values, length)

    @property
    def count(self) -> int:
        """Rows a key/value head."""
        return self.slots.shape[2]

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return self.slots.nbytes + self.places.nbytes + self.keys.nbytes + self.values.nbytes

    def forget(self, share: float = 1.0) -> None:
        """Hold nothing, or not the first of the slots, a share of them: they were given to other tokens."""
        self.slots[:, :, : round(share * self.count)].fill_(-1)

    def change(self, change: Callable[[Tensor], Tensor]) -> ResidentRows:
        """The same change to all, of rows of the batch."""
        slots, places, keys, values = map(change, (self.slots, self.places, self.keys, self.values))
        return ResidentRows(slots, places, keys, values, self.length)
