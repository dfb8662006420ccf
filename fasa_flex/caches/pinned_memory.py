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


def host_rows(key: Tensor, value: Tensor, length: int, device: torch.device) -> Tensor:
    """Room in host memory for ``length`` keys and values, those of a token side by side; `split_rows` parts them.

    Where rows lie scattered over gigabytes, a GPU fetches them so in less than half the time that it takes with keys
    and values apart (evals/results/bench_op_cuda_max.json and, apart, its `repeats`): presumably because it finds out
    once for both where a page of the host's is.

    Args:
        key: [B, Hkv, t, D], such as will be kept.
        value: [B, Hkv, t, Dv], of the same dtype.
        length: tokens.
        device: that will read them.

    Returns:
        [B, Hkv, length, D + Dv], zeros.

    Raises:
        ValueError: the host has no such memory.
    """
    return host_memory((*key.shape[:2], length, key.shape[3] + value.shape[3]), key.dtype, device)


def mapped_rows(key: Tensor, value: Tensor, length: int) -> Tensor:
    """`host_rows` as a tensor of the device of ``key``, whose kernels read and write it across the bus.

    So what runs on a device's tensors runs on it, in a CUDA graph too.
    """
    host = host_rows(key, value, length, key.device)
    if not key.is_cuda:
        return host
    mapped: Tensor = torch.as_tensor(_Mapped(host), device=key.device)
    return mapped.view(host.dtype).view(host.shape)


def split_rows(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The keys [B, Hkv, T, head_dim] and the values that lie side by side in ``rows``, as views."""
    return rows[..., :head_dim], rows[..., head_dim:]


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
