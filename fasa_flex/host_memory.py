"""Host memory that a device reads and writes by itself, so that no step waits for the host (FASA-M)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def host_memory(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros in host memory, pinned where ``like`` is on CUDA.

    Args:
        shape: of the tensor.
        like: whose dtype it has, and whose device will read it.

    Returns:
        a tensor of the host.

    Raises:
        ValueError: the host has no such memory.
    """
    try:
        return torch.zeros(tuple(shape), dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
    except RuntimeError as error:
        size = math.prod(shape) * like.element_size()
        raise ValueError(
            f"the host has no {size} bytes of {'pinned ' * like.is_cuda}memory for keys or values {tuple(shape)} of a "
            f"layer ({error}); keep fewer or shorter sequences, or use placement='device'."
        ) from error


def mapped_memory(shape: Sequence[int], like: Tensor) -> Tensor:
    """`host_memory` as a tensor of the device of ``like``, whose kernels read and write it across the bus.

    So what runs on a device's tensors runs on it, in a CUDA graph too.
    """
    host = host_memory(shape, like)
    if not like.is_cuda:
        return host
    mapped: Tensor = torch.as_tensor(_Mapped(host), device=like.device)
    return mapped.view(like.dtype).view(tuple(shape))


class _Mapped:
    """Pinned memory as bytes of the device, at the same address; what is made of it keeps it alive."""

    def __init__(self, host: Tensor) -> None:
        self._host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._host.nbytes,), "typestr": "|u1", "data": (self._host.data_ptr(), False), "version": 3}
