"""The boundary between dense and sparse queries, and between sparse queries and padding, in a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Boundary:
    """Slots [start, stop) of each batch row, int64 [B] or [1], whose queries are sparse.

    Attributes:
        start: first sparse slot of each row.
        stop: first slot of the padding behind the text, whose queries are not counted; None: there is no padding.
        lowest: smallest element of ``start``.
        highest: largest element of ``start``.
    """

    start: Tensor
    stop: Tensor | None
    lowest: int
    highest: int

    @classmethod
    def of(cls, start: Tensor, stop: Tensor | None) -> Boundary:
        """Make a boundary from checked tensors.

        Raises:
            ValueError: ``start`` or ``stop`` has another shape or dtype, or is negative.
        """
        for name, slots in (("start", start), ("stop", start if stop is None else stop)):
            if slots.dtype != torch.long or slots.dim() != 1 or slots.shape != start.shape or (slots < 0).any():
                raise ValueError(
                    f"{name} must be non-negative int64 slots, one for each row, got {slots.dtype} {slots.tolist()}; "
                    "pass torch.tensor([...]) with as many entries as start and the batch have."
                )
        return cls(start, stop, int(start.min()), int(start.max()))

    def check_rows(self, batch: int) -> None:
        """Check the batch size of a forward.

        Raises:
            ValueError: ``start`` has neither one entry nor ``batch`` entries.
        """
        if len(self.start) not in (1, batch):
            raise ValueError(f"start names {len(self.start)} rows, the batch has {batch}; give each one slot.")

    def behind(self, first_slot: int, q_len: int, device: torch.device) -> Tensor:
        """Whether each query, from slot ``first_slot`` on, is at or behind ``start``: bool [B or 1, Q]."""
        return _slots(first_slot, q_len, device) >= self.start.to(device)[:, None]

    def counted(self, first_slot: int, q_len: int, device: torch.device) -> Tensor | None:
        """Whether each query is before ``stop``, so that it is counted: bool [B or 1, Q]; None: all are."""
        if self.stop is None:
            return None
        return _slots(first_slot, q_len, device) < self.stop.to(device)[:, None]


def _slots(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device)
