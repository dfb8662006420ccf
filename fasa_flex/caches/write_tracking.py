"""What a cache layer remembers of its last write: whose memory it is, and whether somebody has changed it since."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Written:
    """The keys of a layer after its own last write. Shallow copies of a layer share it, as they share the memory.

    Attributes:
        pointer: where the keys lie.
        version: how often they were written to; None for a tensor of inference mode, which does not count.
        end: tokens written, by the copy that went on furthest.
        alone: how many tensors shared the buffer of keys when it was made.
    """

    pointer: int = 0
    version: int | None = None
    end: int = 0
    alone: int = 0

    def mark(self, keys: Tensor, end: int) -> None:
        """Remember keys [B, Hkv, T, D], of which ``end`` tokens are written."""
        self.pointer, self.end = keys.data_ptr(), end
        self.version = None if keys.is_inference() else keys._version

    def knows(self, keys: Tensor) -> bool:
        """Whether these are the keys as they were written last, or the first of them."""
        version = None if keys.is_inference() else keys._version
        return keys.data_ptr() == self.pointer and version == self.version


def held_by(states: Tensor) -> int:
    """How many tensors share the memory of ``states``."""
    storage = states.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # not the one that asks


def counting() -> AbstractContextManager[object]:
    """Make tensors whose writes are counted, in inference mode too."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
