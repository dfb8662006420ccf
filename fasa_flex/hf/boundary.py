"""Where the sparse queries of a forward of several tokens begin and end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Boundary:
    """Slots [start, stop) of each row, int64 [B] or [1], whose queries are sparse.

    Attributes:
        start: the first sparse slot of each row.
        stop: the first slot of padding behind, of which nothing is counted; None: there is none.
        lowest: of all starts.
        highest: likewise.
    """

    start: Tensor
    stop: Tensor | None
    lowest: int
    highest: int

    @classmethod
    def of(cls, start: Tensor, stop: Tensor | None) -> Boundary:
        """Check and keep.

        Raises:
            ValueError: boundaries of another shape or type, or negative ones.
        """
        for name, slots in (("start", start), ("stop", start if stop is None else stop)):
            if slots.dtype != torch.long or slots.dim() != 1 or slots.shape != start.shape or (slots < 0).any():
                raise ValueError(
                    f"{name} must be non-negative int64 slots, one for each row, got {slots.dtype} {slots.tolist()}; "
                    "pass torch.tensor([...]) with as many entries as start and the batch have."
                )
        return cls(start, stop, int(start.min()), int(start.max()))

    def check_rows(self, batch: int) -> None:
        """Refuse a batch of another size.

        Raises:
            ValueError: starts for another number of rows.
        """
        if len(self.start) not in (1, batch):
            raise ValueError(f"start names {len(self.start)} rows, the batch has {batch}; give each one slot.")

    def behind(self, first_slot: int, q_len: int, device: torch.device) -> Tensor:
        """Which queries, of slots ``first_slot`` on, lie behind the start: bool [B or 1, Q]."""
        return _slots(first_slot, q_len, device) >= self.start.to(device)[:, None]

    def counted(self, first_slot: int, q_len: int, device: torch.device) -> Tensor | None:
        """Which queries are no padding behind: bool [B or 1, Q]; None: all."""
        if self.stop is None:
            return None
        return _slots(first_slot, q_len, device) < self.stop.to(device)[:, None]


def _slots(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device)
