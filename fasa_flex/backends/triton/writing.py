"""A decoded token into a cache on a GPU by one kernel, where PyTorch's operators launch six."""

from __future__ import annotations

from torch import Tensor

from fasa_flex.backends.triton.kernels import on_their_device, overlapping, power_of_two, write_states


@on_their_device
def write_token(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    dims: Tensor,
    mean_key: Tensor | None,
    length: Tensor | int,
) -> None:
    """Write a token's states behind those held, where `fasa_flex.backends.triton.dispatch.writes_at_once`; the length
    stays.

    A CUDA graph may replay it beyond the end of a static cache: that stops the device with an assertion.

    Args:
        key: float [B, Hkv, 1, D], each row contiguous.
        value: likewise, [B, Hkv, 1, Dv].
        keys: float [B, Hkv, T, D], the cache's, each row contiguous; on the device, or host memory that it addresses.
        values: likewise, [B, Hkv, T, Dv].
        packed: [B, Hkv, T, P], contiguous; P is 2 * n_tip for a float dtype and int8, n_tip for uint8, which holds keys
            of four bits.
        scales: float16 [B, Hkv, T], contiguous, of integer keys.
        dims: int64 [Hkv, 2 * n_tip], contiguous, the dimensions that are packed.
        mean_key: float32 [Hkv, D], contiguous, what packed keys are less of; None: 0.
        length: the tokens held, of a static cache an int64 scalar on the device.
    """
    batch, kv_heads, capacity, dim = keys.shape
    value_dim, part = values.shape[3], packed.shape[3]
    overlap, launch = overlapping(key.device)
    write_states[(batch * kv_heads,)](
        key, value, keys, values, packed, packed if scales is None else scales, dims,
        dims if mean_key is None else mean_key, length,
        *(states.stride(axis) for states in (key, value, keys, values) for axis in (0, 1)), capacity, keys.stride(2),
        values.stride(2), dim, power_of_two(dim), value_dim, power_of_two(value_dim), dims.shape[1], part,
        power_of_two(part), scales is not None, mean_key is not None, isinstance(length, Tensor), kv_heads, overlap,
        num_warps=1, debug=True, **launch,
    )  # fmt: skip
