"""One total order on scores, so that every device and backend ranks alike.

A score and its slot are packed into one int64: the score's float32 bits, mapped so that integer order is float order,
above the complement of the slot. No two keys are equal, so any partial order of these integers is exact and ties go to
the lower slot; a stable sort would cost 20-40 times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.compiler import operator

INVALID = torch.iinfo(torch.int64).min
"""Below every score: the key may not be selected."""

_FIRST = 0x7FFFFFFF
_NAN = 0x7FC00000

TILE = 16
"""Keys whose maximum is searched first."""

_GRAIN, _WORTH = 1 << 15, 4
"""On CPU `torch.topk` gives a thread at least so many numbers, and as many threads are as fast as one in NumPy."""


def rank_keys(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """Order-preserving integers for scores along the last dimension.

    Args:
        scores: float [..., T], T < 2**32; ranked as float32.
        first: bool, broadcast to ``scores``: slots that rank above all others, whatever their score.

    Returns:
        int64 [..., T], all distinct along T: a higher score is larger, among equal scores the lower slot is larger.
        -0.0 equals 0.0, and NaN ranks above +inf: it is selected and shows in the result instead of hiding.
    """
    scores = scores.float()
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = torch.where(scores != scores, _NAN, ordered)  # isnan, which Inductor's CPU code takes one by one
    if first is not None:
        ordered = torch.where(first, _FIRST, ordered)
    last_first = scores.shape[-1] - 1 - torch.arange(scores.shape[-1], device=scores.device)
    return (ordered.long() << 32) | last_first


def is_first(order: Tensor) -> Tensor:
    """Which of `rank_keys`' integers are of slots that rank ``first``: bool; a key whose score is NaN is not."""
    return (order >> 32) == _FIRST


def slot_of(order: Tensor, kv_len: int) -> Tensor:
    """The slots that `rank_keys` packed into its integers, int64; of INVALID: the last one."""
    return kv_len - 1 - (order & 0xFFFFFFFF)


def largest(order: Tensor, count: int) -> Tensor:
    """The ``count`` largest, at least one, of int64 [..., T] along the last dimension, in any order: [..., count].

    They lie in the ``count`` tiles of 16 with the largest maxima, which a compiler finds while it ranks; the integers
    are those of `rank_keys`, all distinct but for INVALID.
    """
    kv_len = order.shape[-1]
    if kv_len < 2 * TILE * count:
        return _largest(order, count)
    tiles = F.pad(order, (0, -kv_len % TILE), value=INVALID).unflatten(-1, (-1, TILE))
    maxima = tiles.amax(-1)
    best = _largest(maxima, count)
    tile = torch.where(best > INVALID, slot_of(best, kv_len) // TILE, 0)
    repeated = (best == INVALID)[..., None]  # fewer tiles than wanted hold a valid key
    candidates = tiles.gather(-2, tile[..., None].expand(*tile.shape, TILE))
    return _largest(torch.where(repeated, INVALID, candidates).flatten(-2), count)


def _largest(order: Tensor, count: int) -> Tensor:
    if order.device.type == "cpu":
        return _largest_on_cpu(order, count)
    return order.topk(count, dim=-1, sorted=False).values


@operator("largest", lambda order, count: order.new_empty(*order.shape[:-1], count), devices="cpu")
def _largest_on_cpu(order: Tensor, count: int) -> Tensor:
    """By NumPy's partition, whose vector code is many times as fast as `torch.topk`, but on one core."""
    kv_len, rows = order.shape[-1], order.numel() // max(1, order.shape[-1])
    if min(torch.get_num_threads(), rows, order.numel() // _GRAIN) > _WORTH:
        return order.topk(count, dim=-1, sorted=False).values
    first, found = kv_len - count, order.new_empty(*order.shape[:-1], count)
    try:
        from_rows, to_rows = order.numpy().reshape(rows, kv_len), found.numpy().reshape(rows, count)
    except RuntimeError:  # inside a transform of torch.func, whose tensors have no memory
        return order.topk(count, dim=-1, sorted=False).values
    step = max(1, _GRAIN // max(1, kv_len))
    for at in range(0, rows, step):  # a piece and its copy stay in the cache
        piece = from_rows[at : at + step].copy()
        piece.partition(first, axis=-1)
        to_rows[at : at + step] = piece[:, first:]
    return found
