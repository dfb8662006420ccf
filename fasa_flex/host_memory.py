"""Host memory that a device reads and writes by itself, so that no step waits for the host (FASA-M)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory, pinned where ``device`` is CUDA.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: that will read it.

    Returns:
        a tensor of the host.

    Raises:
        ValueError: the host has no such memory.
    """
    pinned = device.type == "cuda"
    try:
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu", pin_memory=pinned)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")  # torch adds its stack
        size = math.prod(shape) * dtype.itemsize
        raise ValueError(
            f"the host has no {size} bytes of {'pinned ' * pinned}memory for keys or values {tuple(shape)} of a "
            f"layer ({reason}); keep fewer or shorter sequences, or use placement='device'."
        ) from error


def mapped_memory(shape: Sequence[int], like: Tensor) -> Tensor:
    """`host_memory` as a tensor of the device of ``like``, whose kernels read and write it across the bus.

    So what runs on a device's tensors runs on it, in a CUDA graph too.
    """
    host = host_memory(shape, like.dtype, like.device)
    if not like.is_cuda:
        return host
    mapped: Tensor = torch.as_tensor(_Mapped(host), device=like.device)
    return mapped.view(like.dtype).view(tuple(shape))


def settle(states: Tensor, device: torch.device) -> None:
    """Wait until ``device`` has written what it was given to write into ``states`` of the host, which is to read them.

    A copy from a device into pinned memory returns before it is done.
    """
    if device.type == "cuda" and not states.is_cuda:
        torch.cuda.current_stream(device).synchronize()


class _Mapped:
    """Pinned memory as bytes of the device, at the same address; what is made of it keeps it alive."""

    def __init__(self, host: Tensor) -> None:
        self._host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._host.nbytes,), "typestr": "|u1", "data": (self._host.data_ptr(), False), "version": 3}
