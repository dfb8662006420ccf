"""Packed keys: the dominant dimensions of all keys, which TIP alone reads (the paper's FASA-C)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.compiler import compute_once, keep_rounding
from fasa_flex.core.option_types import PackedDtype as PackedDtype

_LEVELS = {"int8": 127, "int4": 7}
"""The largest code of an integer format; codes are symmetric about 0."""

INT4_ZERO = 8
"""Stored four-bit number for the code 0."""

_BLOCK = 1024
"""Tiles that eager code scores at once: of 64 dimensions 4 MiB of floats, few enough for a CPU's last cache."""

_FUSED = 16
"""Most queries of a group whose products with integer keys Inductor computes as it loads these: one reduction each."""


def tile_of(device: torch.device) -> int:
    """Number of keys in one tile: 16 on a CPU, where they fill one or two vector registers; 1 on other devices."""
    return 16 if device.type == "cpu" else 1


def _tiles_for(capacity: int, tile: int) -> int:
    """Tiles of a multiple of 16 keys, so that a GPU's threads read several scales at once in any head."""
    return -(-capacity // 16) * 16 // tile


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """Packed keys in tiles of L keys; a tile stores dimension by dimension, for each the numbers of its L keys.

    On a CPU the scores of a tile are then sums of full vectors, and the G query heads of a group load each tile once.
    The scores only rank, so that packed keys may have a lower precision than the cache.

    Attributes:
        tiles: [B, Hkv, N, P, L], keys n * L ... n * L + L - 1 in tile n. P is 2 * n_tip for a float dtype and int8,
            and n_tip for int4: byte p of a key holds the codes of dimensions p (its low four bits) and n_tip + p, each
            with 8 added.
        scales: float16 [B, Hkv, N, L], the factor of each key's integer codes; None for float tiles.
    """

    tiles: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, dtype: PackedDtype | None = None, capacity: int = 0) -> PackedKeys:
        """Pack keys.

        Args:
            rows: float [B, Hkv, T, 2 * n_tip], the keys at the dominant dimensions.
            dtype: precision of the packed keys; None: the dtype of ``rows``.
            capacity: number of keys to allocate; at least T are allocated, a multiple of 16, and unused ones are zero.
        """
        batch, heads, kv_len, _ = rows.shape
        tile = tile_of(rows.device)
        count = _tiles_for(max(kv_len, capacity), tile)
        rows, scales = convert_rows(F.pad(rows, (0, 0, 0, count * tile - kv_len)), dtype)
        tiles = rows.view(batch, heads, count, tile, -1).transpose(3, 4).contiguous()
        return cls(tiles, None if scales is None else scales.view(batch, heads, count, tile))

    @property
    def capacity(self) -> int:
        """Number of keys allocated."""
        return self.tiles.shape[2] * self.tiles.shape[4]

    @property
    def width(self) -> int:
        """Number of dimensions per key, 2 * n_tip."""
        return self.tiles.shape[3] * (2 if self.tiles.dtype == torch.uint8 else 1)

    @property
    def n_bytes(self) -> int:
        """Size of tiles and scales in bytes."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.tiles.nbytes + scales

    def write(self, rows: Tensor, slots: Tensor | int) -> None:
        """Write keys in place.

        Args:
            rows: float [B, Hkv, t, 2 * n_tip], keys at the dominant dimensions.
            slots: int64 [t], the slot of each key; an int: the slot of the first key, with the others behind it.
        """
        lanes, length = self.tiles.shape[4], rows.shape[2]
        integers: PackedDtype = "int4" if self.tiles.dtype == torch.uint8 else "int8"
        rows, scales = convert_rows(rows, None if self.scales is None else integers)
        if isinstance(slots, int):
            if (lanes == 1 or length == 1) and not torch.compiler.is_compiling():  # plain copies are fastest
                first, place = divmod(slots, lanes)
                self.tiles[:, :, first : first + length, :, place].copy_(rows)
                if self.scales is not None and scales is not None:
                    self.scales[:, :, first : first + length, place].copy_(scales)
                return
            slots = torch.arange(slots, slots + length, device=rows.device)
        if lanes == 1:  # a kernel each; written through a view, Inductor would copy the whole buffer twice
            self.tiles.index_copy_(2, slots, rows.to(self.tiles.dtype)[..., None])
            if self.scales is not None and scales is not None:
                self.scales.index_copy_(2, slots, scales[..., None])
            return
        tile, lane = slots // lanes, slots % lanes
        if self.scales is not None and scales is not None:
            self.scales[:, :, tile, lane] = scales
        # indices that are separated by a slice move to the front: [t, B, Hkv, 2 * n_tip]
        self.tiles[:, :, tile, :, lane] = rows.permute(2, 0, 1, 3).to(self.tiles.dtype)

    def rows(self, kv_len: int) -> Tensor:
        """Return the first ``kv_len`` keys, restored to floats [B, Hkv, T, 2 * n_tip]."""
        rows = self.tiles.transpose(3, 4).flatten(2, 3)[:, :, :kv_len]
        return _restore(rows, None if self.scales is None else self.scales.flatten(2)[:, :, :kv_len])

    def scores(self, query: Tensor, kv_len: int) -> Tensor:
        """Compute dot products with one query per query head.

        Args:
            query: float [B, Hkv, G, 2 * n_tip], at the dominant dimensions.
            kv_len: T, number of keys to score.

        Returns:
            float32 [B, Hkv, G, T].
        """
        count, compiled = -(-kv_len // self.tiles.shape[4]), torch.compiler.is_compiling()
        fused = compiled and self.scales is not None and query.shape[2] <= _FUSED
        if self.tiles.shape[4] == 1 and not fused:  # restored keys, which a compiled product would store as floats
            return dot_products(query, self.rows(kv_len))
        tiles = self.tiles[:, :, :count]
        scales = None if self.scales is None else self.scales[:, :, :count, None]
        if not compiled:
            return _scores_by_block(query, tiles, scales).flatten(3)[..., :kv_len]
        scores = _scores_of_tiles(compute_once(query.detach().float()), tiles)
        if scales is not None:
            scores = scores * scales.float()
        return scores.transpose(2, 3).flatten(3)[..., :kv_len]

    def change(self, change: Callable[[Tensor], Tensor]) -> PackedKeys:
        """Apply ``change`` to tiles and scales, such as a selection of batch rows or a move to another device."""
        return PackedKeys(change(self.tiles), None if self.scales is None else change(self.scales))

    def grown(self, capacity: int) -> PackedKeys:
        """Return a copy with room for ``capacity`` keys."""
        more = _tiles_for(capacity, self.tiles.shape[4]) - self.tiles.shape[2]
        tiles = F.pad(self.tiles, (0, 0, 0, 0, 0, more))
        return PackedKeys(tiles, None if self.scales is None else F.pad(self.scales, (0, 0, 0, more)))


def packed_bytes(width: int, dtype: PackedDtype | None, cache_dtype: torch.dtype) -> float:
    """Size in bytes of one packed key of ``width`` dimensions in one head, including its scale."""
    if dtype in _LEVELS:
        return width * (0.5 if dtype == "int4" else 1) + 2
    return width * (cache_dtype.itemsize if dtype is None else 2)


def as_packed(rows: Tensor, dtype: PackedDtype | None) -> Tensor:
    """Round keys [.., 2 * n_tip] as `PackedKeys` does in ``dtype``, and return them as floats."""
    return _restore(*convert_rows(rows, dtype))


def dot_products(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries [.., Q, D] by keys [.., T, D]: float32 [.., Q, T] under autocast too, or scores would tie."""
    with torch.autocast(query.device.type, enabled=False):
        if query.is_cuda and query.dim() == 4 and query.dtype == key.dtype in (torch.bfloat16, torch.float16):
            scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
            return scores.view(*query.shape[:3], -1)
        return query.float() @ key.float().mT


def _scores_of_tiles(query: Tensor, tiles: Tensor) -> Tensor:
    """Compute the dot products in one compiled kernel, which loads each tile once for all query heads of the group.

    Queries [B, Hkv, G, 2 * n_tip] and tiles [B, Hkv, N, P, L] give [B, Hkv, N, G, L].
    """
    if tiles.dtype == torch.uint8:  # Inductor's vector code has these operators for 32-bit integers only (torch 2.13)
        wide = tiles.to(torch.int32)
        parts, zero = [wide & 15, wide >> 4], INT4_ZERO
        if tiles.shape[4] == 1:  # on a GPU the sums over the query would be kernels of their own
            parts, zero = [part - zero for part in parts], 0
        parts = [part.float() for part in parts]
    else:
        parts, zero = [tiles.float()], 0
    members = []
    for member in query.unbind(2):
        halves = member[:, :, None, :, None].chunk(len(parts), dim=3)
        products = [half * part for half, part in zip(halves, parts, strict=True)]
        score = functools.reduce(torch.add, products).sum(3)
        members.append(score - zero * member.sum(-1)[:, :, None, None] if zero else score)
    return torch.stack(members, dim=2).transpose(2, 3)


def _scores_by_block(query: Tensor, tiles: Tensor, scales: Tensor | None) -> Tensor:
    """Compute the scores eagerly, block by block: unpacked tiles stay in the CPU's cache, in memory that is used again.

    Queries [B, Hkv, G, 2 * n_tip], tiles [B, Hkv, N, P, L] and scales [B, Hkv, N, 1, L] give [B, Hkv, G, N, L].
    """
    (batch, heads, count, _, lanes), group = tiles.shape, query.shape[2]
    scores = query.new_empty(batch, heads, group, count, lanes, dtype=torch.float32)
    found, held, query = scores.flatten(0, 1).transpose(1, 2), tiles.flatten(0, 1), query.float().flatten(0, 1)
    factors = None if scales is None else scales.flatten(0, 1)
    rows = max(1, _BLOCK // max(1, count))  # a block is several heads, or a part of one
    with torch.autocast(tiles.device.type, enabled=False):
        for row, tile in itertools.product(range(0, batch * heads, rows), range(0, count, _BLOCK)):
            block = slice(row, row + rows), slice(tile, tile + _BLOCK)
            products = query[block[0], None] @ _unpack(held[block], 2).float()
            found[block] = products if factors is None else products * factors[block].float()
    return scores


def convert_rows(rows: Tensor, dtype: PackedDtype | None) -> tuple[Tensor, Tensor | None]:
    """Convert keys [.., 2 * n_tip] to the codes of ``dtype``, [.., P]; an integer dtype adds scales, float16 [..]."""
    if dtype is None:
        return rows, None
    if dtype not in _LEVELS:
        return rows.to(getattr(torch, dtype)), None
    compiling, most = torch.compiler.is_compiling(), _LEVELS[dtype]
    rows = (keep_rounding(rows) if compiling else rows).float()
    scales = (rows.abs().amax(-1) / most).clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)
    if compiling:
        scales = keep_rounding(scales)
    codes = (rows / scales.float()[..., None]).round().clamp(-most, most).to(torch.int8)
    if dtype == "int8":
        return codes, scales
    low, high = (codes + INT4_ZERO).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4), scales


def _unpack(packed: Tensor, dim: int) -> Tensor:
    """Unpack int4 codes along ``dim`` to int8 [.., 2 * n_tip, ..]; return int8 codes and floats unchanged."""
    if packed.dtype != torch.uint8:
        return packed
    return torch.cat([packed & 15, packed >> 4], dim=dim).view(torch.int8) - INT4_ZERO


def _restore(rows: Tensor, scales: Tensor | None) -> Tensor:
    """Undo `convert_rows`, up to rounding: keys [.., P] become floats [.., 2 * n_tip]."""
    return rows if scales is None else _unpack(rows, -1) * scales[..., None].float()
