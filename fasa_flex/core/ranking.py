"""A total order on scores, the same on every device and in every backend.

One int64 holds a score and its slot: in the high 32 bits the score's float32 bits, mapped so that integers order as
floats do, in the low 32 bits the slot, counted from the end. All keys differ, so that an unstable partial sort of these
integers is exact and ties go to the lower slot; a stable sort would take 20-40 times as long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.compiler import compute_once, operator

INVALID = torch.iinfo(torch.int64).min
"""Ranks below every score: the key may not be selected."""

_FIRST = 0x7FFFFFFF
_NAN = 0x7FC00000

TILE = 16
"""Keys per tile; `largest` compares the maxima of tiles before it reads single keys."""

_ROW = 8192
"""The longest row that Inductor reduces in one kernel on a GPU, however few rows there are (torch 2.13)."""

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


def in_tiles(states: Tensor, fill: float = 0) -> Tensor:
    """Split the last dimension into tiles: [..., T] to [..., tiles, 16], with ``fill`` behind the last key."""
    tiles: Tensor = F.pad(states, (0, -states.shape[-1] % TILE), value=fill).unflatten(-1, (-1, TILE))
    return tiles


def largest(order: Tensor, count: int) -> Tensor:
    """Find the ``count`` largest integers along the last dimension, unsorted: int64 [..., count].

    They lie in the ``count`` tiles of 16 keys with the largest maxima, and those in as few tiles of maxima, so that
    every search is among few integers; compiled code finds the first maxima while it ranks.

    Args:
        order: int64 [..., T], integers of `rank_keys`: all distinct except for INVALID.
        count: number to find, at least 1.
    """
    if order.device.type == "cpu":
        return _by_tiles(order, count, 2 * TILE * count, _partition)
    if torch.compiler.is_compiling():
        return _by_tiles_and_counts(order, count)
    return _by_tiles(order, count, 2 * TILE * count, _topk)


def _by_tiles_and_counts(order: Tensor, count: int) -> Tensor:
    """Compute `largest` for rows of at most `_ROW`; for more candidates than that, with `torch.topk`."""
    return _by_tiles(order, count, max(_ROW + 1, TILE * count), _by_counts)


def _by_tiles(order: Tensor, count: int, few: int, best_of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Compute `largest`: rows of ``few``, at least ``16 * count``, and more integers are searched by their tiles."""
    kv_len, levels = order.shape[-1], [order]
    while levels[-1].shape[-1] >= few:
        levels.append(in_tiles(levels[-1], INVALID).amax(-1))
    best = best_of(levels.pop(), count)
    while levels:
        tile = torch.where(best > INVALID, slot_of(best, kv_len) // TILE ** len(levels), 0)[..., None]
        tiles = in_tiles(levels.pop(), INVALID)
        candidates = tiles.gather(-2, tile.expand(*tile.shape[:-1], TILE))
        repeated = (best == INVALID)[..., None]  # fewer tiles than wanted hold a valid key
        best = best_of(torch.where(repeated, INVALID, candidates).flatten(-2), count)
    return best


def _topk(order: Tensor, count: int) -> Tensor:
    return order.topk(count, dim=-1, sorted=False).values


def _by_counts(order: Tensor, count: int) -> Tensor:
    """Find the least of the largest scores two bits at a time, by counting the scores that reach three thresholds.

    One sum of 64 bits holds the three counts, in 16 bits each, since in every sum the threads of a row wait for others.
    Inductor fuses the 16 steps into one or two kernels, whose loops find their row in the GPU's first cache.
    `torch.topk` is for long rows: it takes 47 us for 8 rows of 8192 and 24 us for 8 rows of 4096 (H100, torch 2.11).

    Args:
        order: int64 [..., T], integers of `rank_keys` by ascending slot; of equal scores the first are the largest.
        count: number to find, at most T.

    Returns:
        int64 [..., count], by ascending slot.
    """
    if order.shape[-1] > _ROW:
        return _topk(order, count)
    scores = compute_once((order >> 32).to(torch.int32))
    least = torch.full_like(scores[..., :1], torch.iinfo(torch.int32).min)
    above = torch.zeros_like(least)  # number of scores above ``least``
    for shift in range(30, -1, -2):
        first, second, third = [(scores >= least + (step << shift)).long() for step in (1, 2, 3)]
        counts = (first + (second << 16) + (third << 32)).sum(-1, keepdim=True)
        for bits in (0, 16, 32):
            reached = ((counts >> bits) & 0xFFFF).to(torch.int32)
            least = torch.where(reached >= count, least + (1 << shift), least)
            above = torch.maximum(above, torch.where(reached < count, reached, 0))
    equal = (scores == least).cumsum(-1, dtype=torch.int32)  # the first of them are in lower slots
    place = (scores > least).cumsum(-1, dtype=torch.int32) + torch.minimum(equal, count - above)
    return order.gather(-1, where_reached(place, count))


def where_reached(number: Tensor, count: int) -> Tensor:
    """Find the first slot whose number reaches 1, the first that reaches 2, and so on up to ``count``.

    Numbers above a row's last one give the slot that reaches the last one. The wanted numbers so differ by row: for
    equal ones, Inductor's search compiles in no kernel with several rows to a program (torch 2.13).

    Args:
        number: int [..., T], ascending.
        count: how many slots to find.

    Returns:
        int64 [..., count].
    """
    wanted = torch.arange(1, count + 1, dtype=number.dtype, device=number.device)
    return torch.searchsorted(number, torch.minimum(wanted, number[..., -1:]))


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
