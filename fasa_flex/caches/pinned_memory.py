"""Pinned host memory that GPU kernels read and write directly, so that no step waits for the host (FASA-M)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros in host memory, pinned if ``device`` is CUDA.

    Args:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        device: device that will read the tensor.

    Returns:
        a CPU tensor.

    Raises:
        ValueError: the host cannot allocate the memory.
    """
    pinned = device.type == "cuda"
    try:
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu", pin_memory=pinned)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")  # without the stack
        size = math.prod(shape) * dtype.itemsize
        raise ValueError(
            f"the host has no {size} bytes of {'pinned ' * pinned}memory for keys or values {tuple(shape)} of a "
            f"layer ({reason}); keep fewer or shorter sequences, or use placement='device'."
        ) from error


def host_rows(key: Tensor, value: Tensor, length: int, device: torch.device) -> Tensor:
    """Allocate host memory for ``length`` tokens, with key and value of a token side by side; see `split_rows`.

    A GPU fetches rows that are scattered over gigabytes in less than half the time than from separate buffers of keys
    and values (evals/results/bench_op_cuda_max.json; separate buffers in its `repeats`), presumably because both need
    one address translation of a host page.

    Args:
        key: [B, Hkv, t, D], sets the sizes and the dtype.
        value: [B, Hkv, t, Dv], of the same dtype.
        length: number of tokens.
        device: device that will read the memory.

    Returns:
        [B, Hkv, length, D + Dv], zeros.

    Raises:
        ValueError: the host cannot allocate the memory.
    """
    return host_memory((*key.shape[:2], length, key.shape[3] + value.shape[3]), key.dtype, device)


def mapped_rows(key: Tensor, value: Tensor, length: int) -> Tensor:
    """Allocate `host_rows` and return them as a tensor on the device of ``key``, whose kernels access it over the bus.

    Operations on device tensors therefore accept it, in a CUDA graph too.
    """
    host = host_rows(key, value, length, key.device)
    if not key.is_cuda:
        return host
    mapped: Tensor = torch.as_tensor(_Mapped(host), device=key.device)
    return mapped.view(host.dtype).view(host.shape)


def split_rows(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Split ``rows`` of `host_rows` into views of the keys [B, Hkv, T, head_dim] and of the values."""
    return rows[..., :head_dim], rows[..., head_dim:]


def settle(states: Tensor, device: torch.device) -> None:
    """Wait until ``device`` has finished its writes to the host tensor ``states``, before the host reads it.

    A copy from a device to pinned memory returns before it has finished.
    """
    if device.type == "cuda" and not states.is_cuda:
        torch.cuda.current_stream(device).synchronize()


class _Mapped:
    """Presents pinned memory as device memory at the same address; tensors made from it keep it alive."""

    def __init__(self, host: Tensor) -> None:
        self._host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._host.nbytes,), "typestr": "|u1", "data": (self._host.data_ptr(), False), "version": 3}
