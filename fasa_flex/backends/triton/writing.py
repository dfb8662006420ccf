"""Writes a decoded token into a cache on a GPU by one kernel; PyTorch's operators need six."""

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
    """Append a token's key, value and packed key to a cache; ``length`` is not changed.

    For calls that `fasa_flex.backends.triton.dispatch.writes_at_once` accepts. If a CUDA graph is replayed beyond the
    end of a static cache, a device assertion fails.

    Args:
        key: float [B, Hkv, 1, D], rows contiguous.
        value: float [B, Hkv, 1, Dv], rows contiguous.
        keys: the cache's, float [B, Hkv, T, D], rows contiguous; on the device or in mapped host memory.
        values: the cache's, float [B, Hkv, T, Dv], likewise.
        packed: the cache's packed keys [B, Hkv, T, P], contiguous; P is 2 * n_tip for float dtypes and int8, n_tip for
            uint8, two codes of four bits.
        scales: scales of integer keys, float16 [B, Hkv, T], contiguous; None for float dtypes.
        dims: packed dimensions, int64 [Hkv, 2 * n_tip], contiguous.
        mean_key: mean key, subtracted before packing, float32 [Hkv, D], contiguous; None: 0.
        length: number of tokens in the cache; for a static cache an int64 scalar on the device.
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
