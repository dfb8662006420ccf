"""Record of a cache layer's last write, which tells whether other code has changed or shares its keys."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Written:
    """Address and version of a layer's keys after its last write. Shallow copies of a layer share it, like the memory.

    Attributes:
        pointer: address of the keys.
        version: PyTorch's count of writes to them; None for inference tensors, which have no count.
        end: number of tokens written, by the copy of the layer that wrote most.
        alone: number of tensors on the keys' buffer when it was allocated.
    """

    pointer: int = 0
    version: int | None = None
    end: int = 0
    alone: int = 0

    def mark(self, keys: Tensor, end: int) -> None:
        """Record keys [B, Hkv, T, D], of which ``end`` tokens are written."""
        self.pointer, self.end = keys.data_ptr(), end
        self.version = None if keys.is_inference() else keys._version

    def knows(self, keys: Tensor) -> bool:
        """Whether ``keys`` are the recorded keys or the first of them, with no write since."""
        version = None if keys.is_inference() else keys._version
        return keys.data_ptr() == self.pointer and version == self.version


def held_by(states: Tensor) -> int:
    """Number of tensors that share the memory of ``states``."""
    storage = states.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # without the ``storage`` above


def counting() -> AbstractContextManager[object]:
    """Context in which new tensors count their writes, within inference mode too."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
