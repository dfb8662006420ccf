"""Writes tokens into a cache, or into pages, on a GPU by one kernel; PyTorch's operators need six, or twenty."""

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
        packed: the cache's packed keys [B, Hkv, C, P], contiguous, C >= T; P is 2 * n_tip for float dtypes and int8,
            n_tip for uint8, two codes of four bits.
        scales: scales of integer keys, float16 [B, Hkv, C], contiguous; None for float dtypes.
        dims: packed dimensions, int64 [Hkv, 2 * n_tip], contiguous.
        mean_key: mean key, subtracted before packing, float32 [Hkv, D], contiguous; None: 0.
        length: number of tokens in the cache; for a static cache an int64 scalar on the device.
    """
    _write(key, value, keys, values, packed, scales, dims, mean_key, length, None, 0)


@on_their_device
def write_pages(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    dims: Tensor,
    mean_key: Tensor | None,
    blocks: Tensor,
    offsets: Tensor,
    stride: int,
) -> None:
    """Write new tokens' keys, values and packed keys into the pages of a paged cache.

    Args:
        key: float [N, Hkv, D], rows contiguous.
        value: float [N, Hkv, Dv], rows contiguous.
        keys: the rows of all pages, float [R, Hkv, D], rows contiguous.
        values: float [R, Hkv, Dv], likewise.
        packed: packed keys of all blocks [blocks, Hkv, page, P], contiguous, as for `write_token`.
        scales: float16 [blocks, Hkv, page], contiguous; None for float dtypes.
        dims: as for `write_token`, as ``mean_key`` is.
        blocks: int64 [N], the block of each token.
        offsets: int64 [N], its place in the block.
        stride: distance of two blocks in rows of ``keys``.
    """
    of_key, of_value = (states.transpose(0, 1)[None].expand(len(key), -1, -1, -1) for states in (keys, values))
    new = key[:, :, None], value[:, :, None]
    _write(*new, of_key, of_value, packed, scales, dims, mean_key, blocks, offsets, stride)


def _write(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    dims: Tensor,
    mean_key: Tensor | None,
    length: Tensor | int,
    offsets: Tensor | None,
    stride: int,
) -> None:
    """Launch the kernel, with ``offsets`` on pages."""
    batch, kv_heads, capacity, dim = keys.shape
    value_dim, part = values.shape[3], packed.shape[3]
    overlap, launch = overlapping(key.device)
    write_states[(batch * kv_heads,)](
        key, value, keys, values, packed, packed if scales is None else scales, dims,
        dims if mean_key is None else mean_key, length, dims if offsets is None else offsets,
        *(states.stride(axis) for states in (key, value, keys, values) for axis in (0, 1)), capacity, packed.shape[2],
        stride, keys.stride(2), values.stride(2), dim, power_of_two(dim), value_dim, power_of_two(value_dim),
        dims.shape[1], part, power_of_two(part), scales is not None, mean_key is not None, isinstance(length, Tensor),
        0 if offsets is None else packed.shape[2], kv_heads, overlap, num_warps=1, debug=True, **launch,
    )  # fmt: skip
