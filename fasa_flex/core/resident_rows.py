"""Rows of the last decode step's selection, kept on the device so that the next step fetches only new rows (FASA-M)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResidentRows:
    """Rows of one layer's keys and values on the device; `fasa_flex.backends.triton.decode.hold_slots` updates them.

    Consecutive decode steps select largely the same slots, so that most rows are on the device when a step begins, and
    the step fetches the others from host memory.

    Attributes:
        slots: int32 [B, Hkv, N], slots whose rows are on the device, ascending; -1: none.
        places: int32 [B, Hkv, N], index into ``keys`` and ``values`` of each slot's row, a permutation of 0 to N - 1.
        keys: float [B, Hkv, N, D], rows of keys.
        values: float [B, Hkv, N, Dv], rows of values.
        length: int64 scalar, the token count of a static cache, which can be rewound unnoticed; None: the cache grows.
    """

    slots: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor | None = None

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, count: int, length: Tensor | None = None) -> ResidentRows:
        """Allocate ``count`` rows per key/value head, with the sizes and dtypes of ``key`` and ``value``."""
        slots = torch.full((*key.shape[:2], count), -1, dtype=torch.int32, device=key.device)
        places = torch.arange(count, dtype=torch.int32, device=key.device).expand_as(slots).contiguous()
        keys, values = (states.new_zeros(*states.shape[:2], count, states.shape[3]) for states in (key, value))
        if not torch.compiler.is_compiling():
            for tensor in (slots, places, keys, values):
                torch._dynamo.mark_static_address(tensor)
        return cls(slots, places, keys, values, length)

    @property
    def count(self) -> int:
        """Number of rows per key/value head."""
        return self.slots.shape[2]

    @property
    def n_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return self.slots.nbytes + self.places.nbytes + self.keys.nbytes + self.values.nbytes

    def forget(self, share: float = 1.0) -> None:
        """Discard the first ``share`` of the slots: the cache has written other tokens to them."""
        self.slots[:, :, : round(share * self.count)].fill_(-1)

    def change(self, change: Callable[[Tensor], Tensor]) -> ResidentRows:
        """Apply ``change`` to every tensor, such as a selection of batch rows."""
        slots, places, keys, values = map(change, (self.slots, self.places, self.keys, self.values))
        return ResidentRows(slots, places, keys, values, self.length)
