"""A total order on scores, the same on every device and in every backend.

One int64 holds a score and its slot: in the high 32 bits the score's float32 bits, mapped so that integers order as
floats do, in the low 32 bits the slot, counted from the end. All keys differ, so that an unstable partial sort of these
integers is exact and ties go to the lower slot; a stable sort would take 20-40 times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.compiler import operator

INVALID = torch.iinfo(torch.int64).min
"""Ranks below every score: the key may not be selected."""

_FIRST = 0x7FFFFFFF
_NAN = 0x7FC00000

TILE = 16
"""Keys per tile; `largest` compares the maxima of tiles before it reads single keys."""

_GRAIN, _WORTH = 1 << 15, 4
"""On a CPU `torch.topk` gives each thread at least 32,768 numbers, and NumPy on one core is as fast as 4 threads."""


def rank_keys(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """Convert scores along the last dimension to order-preserving integers.

    Args:
        scores: float [..., T], T < 2**32; ranked as float32.
        first: bool, broadcast to ``scores``; True: the slot ranks above all others, whatever its score.

    Returns:
        int64 [..., T], all distinct along T: a higher score is larger, among equal scores the lower slot is larger.
        -0.0 equals 0.0. NaN ranks above +inf, so that it is selected and shows in the result.
    """
    scores = scores.float()
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = torch.where(scores != scores, _NAN, ordered)  # Inductor does not vectorise isnan on CPU
    if first is not None:
        ordered = torch.where(first, _FIRST, ordered)
    last_first = scores.shape[-1] - 1 - torch.arange(scores.shape[-1], device=scores.device)
    return (ordered.long() << 32) | last_first


def is_first(order: Tensor) -> Tensor:
    """Whether each integer of `rank_keys` belongs to a slot of ``first``: bool; False for a score of NaN."""
    return (order >> 32) == _FIRST


def slot_of(order: Tensor, kv_len: int) -> Tensor:
    """Unpack the slots from the integers of `rank_keys`: int64; INVALID gives the last slot."""
    return kv_len - 1 - (order & 0xFFFFFFFF)


def largest(order: Tensor, count: int) -> Tensor:
    """Find the ``count`` largest integers along the last dimension, unsorted: int64 [..., count].

    They lie in the ``count`` tiles of 16 keys with the largest maxima; compiled code finds these while it ranks.

    Args:
        order: int64 [..., T], integers of `rank_keys`: all distinct except for INVALID.
        count: number to find, at least 1.
    """
    kv_len, best_of = order.shape[-1], _partition if order.device.type == "cpu" else _topk
    if kv_len < 2 * TILE * count:
        return best_of(order, count)
    tiles = F.pad(order, (0, -kv_len % TILE), value=INVALID).unflatten(-1, (-1, TILE))
    maxima = tiles.amax(-1)
    best = best_of(maxima, count)
    tile = torch.where(best > INVALID, slot_of(best, kv_len) // TILE, 0)
    repeated = (best == INVALID)[..., None]  # fewer tiles than wanted hold a valid key
    candidates = tiles.gather(-2, tile[..., None].expand(*tile.shape, TILE))
    return best_of(torch.where(repeated, INVALID, candidates).flatten(-2), count)


def _topk(order: Tensor, count: int) -> Tensor:
    return order.topk(count, dim=-1, sorted=False).values


@operator("largest", lambda order, count: order.new_empty(*order.shape[:-1], count), devices="cpu")
def _partition(order: Tensor, count: int) -> Tensor:
    """Use NumPy's partition: one core, but its vector code is many times as fast as `torch.topk`."""
    kv_len, rows = order.shape[-1], order.numel() // max(1, order.shape[-1])
    if min(torch.get_num_threads(), rows, order.numel() // _GRAIN) > _WORTH:
        return _topk(order, count)
    first, found = kv_len - count, order.new_empty(*order.shape[:-1], count)
    try:
        from_rows, to_rows = order.numpy().reshape(rows, kv_len), found.numpy().reshape(rows, count)
    except RuntimeError:  # tensors inside a transform of torch.func have no memory
        return _topk(order, count)
    step = max(1, _GRAIN // max(1, kv_len))
    for at in range(0, rows, step):  # a piece and its copy fit into the CPU's cache
        piece = from_rows[at : at + step].copy()
        piece.partition(first, axis=-1)
        to_rows[at : at + step] = piece[:, first:]
    return found
