"""The grid of a prefill: blocks of 128 valid tokens of each batch row, for the queries of one forward and for all keys.

Token n of a row is its n-th valid token, counted from 0. Padding and earlier chunks of the prompt therefore do not
shift the grid: block m of a row holds its tokens 128 m to 128 m + 127, in whatever slots of the cache they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasa_flex.core.pieces import rows_that_fit

BLOCK = 128
"""Tokens of a block, of queries and of keys: a tile of Inductor's kernel."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Blocks of the queries of one forward and of the keys that they may attend to; R is B or 1.

    Attributes:
        first: int64 [R], number of the first block of queries; the block of keys with this number is its diagonal.
        places: int64 [R, Q], place of each query among the M * 128 places of the blocks; -1: it does not take part.
        queries: int64 [R, M * 128], the query at each place; a place without one repeats the nearest.
        slots: int64 [R, N * 128], slot of each token; places behind the last token repeat its slot.
        begins: number of the first block of queries of each row, as ``first``.
        blocks: number of blocks of queries of each row, up to M.
        tokens: number of tokens of every row; None: rows have different numbers.
        in_order: whether place i holds query i.
        is_packed: whether token i is in slot i.
    """

    first: Tensor
    places: Tensor
    queries: Tensor
    slots: Tensor
    begins: tuple[int, ...]
    blocks: tuple[int, ...]
    tokens: int | None
    in_order: bool
    is_packed: bool

    @classmethod
    def of(cls, n_valid: Tensor, number: Tensor, takes_part: Tensor | None = None) -> Grid | None:
        """Make the grid of a forward; None if no query takes part.

        Args:
            n_valid: int64 [B, Q], number of valid keys of each query.
            number: int64 [B or 1, T], number of the last query's valid keys up to and including each slot.
            takes_part: bool [B or 1, Q], the queries that attend by blocks: a run of them in each row; None: all. A
                query without a valid key never does.
        """
        rows = max(len(number), 1 if takes_part is None else len(takes_part))
        n_valid, number = n_valid[:rows].contiguous(), number.expand(rows, -1).contiguous()
        part = n_valid > 0 if takes_part is None else takes_part & (n_valid > 0)
        begin = torch.where(part, n_valid, number.shape[1] + 1).amin(1) - 1
        end = torch.where(part, n_valid, 0).amax(1)
        begin = torch.where(end > 0, begin, 0)
        last = number.gather(1, (end - 1).clamp(min=0)[:, None])[:, 0]
        begins, ends, lasts = torch.stack([begin, end, last]).tolist()  # the only wait for the device
        if not any(ends):
            return None
        first = tuple(at // BLOCK for at in begins)
        blocks = tuple(-(-stop // BLOCK) - at for stop, at in zip(ends, first, strict=True))
        device, q_len = n_valid.device, n_valid.shape[1]
        start = BLOCK * torch.tensor(first, device=device)[:, None]
        token = start + torch.arange(max(blocks) * BLOCK, device=device)
        nearest = torch.minimum(torch.maximum(token, begin[:, None]), (end - 1).clamp(min=0)[:, None])
        keys = torch.arange(-(-max(ends) // BLOCK) * BLOCK, device=device).expand(rows, -1)
        keys = torch.minimum(keys, (end - 1).clamp(min=0)[:, None]).contiguous()
        return cls(
            first=start[:, 0] // BLOCK,
            places=torch.where(part, n_valid - 1 - start, -1),
            queries=torch.searchsorted(n_valid, nearest + 1).clamp(max=q_len - 1),
            slots=torch.searchsorted(number, keys + 1).clamp(max=number.shape[1] - 1),
            begins=first,
            blocks=blocks,
            tokens=ends[0] if len(set(ends)) == 1 else None,
            in_order=all(not at % BLOCK and stop - at == q_len for at, stop in zip(begins, ends, strict=True)),
            is_packed=lasts == ends,
        )

    @property
    def n_queries(self) -> int:
        """M, blocks of queries of the longest row."""
        return self.queries.shape[1] // BLOCK

    @property
    def n_keys(self) -> int:
        """N, blocks of keys of the longest row."""
        return self.slots.shape[1] // BLOCK

    @property
    def diagonal(self) -> Tensor:
        """Number of the block of keys on the diagonal of each block of queries: int64 [R, M]."""
        numbers = self.first[:, None] + torch.arange(self.n_queries, device=self.first.device)
        return numbers.clamp(max=self.n_keys - 1)

    def to(self, device: torch.device) -> Grid:
        """Return the grid with its tensors on ``device``."""
        if self.first.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("first", "places", "queries", "slots")}
        return replace(self, **moved)

    def queries_at(self, places: Sequence[int]) -> Tensor:
        """The queries at some places of every block: int64 [R, M * len(places)]."""
        return _of_blocks(self.queries, places)

    def slots_at(self, places: Sequence[int]) -> Tensor:
        """The slots of the tokens at some places of every block: int64 [R, N * len(places)]."""
        return _of_blocks(self.slots, places)


def _of_blocks(index: Tensor, places: Sequence[int]) -> Tensor:
    chosen = torch.tensor(list(places), device=index.device)
    return index.view(len(index), -1, BLOCK)[:, :, chosen].flatten(1)


def take(states: Tensor, index: Tensor) -> Tensor:
    """Take rows [B, H, n, D] of queries, keys or values [B, H, T, D] at ``index``, int64 [B or 1, n]."""
    if len(index) == 1:
        return states.index_select(2, index[0])
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def rows_of_piece(row_bytes: int, on_cuda: bool) -> int:
    """Blocks of queries that are computed at a time: four times as many on a GPU, where each piece is many launches."""
    return rows_that_fit(row_bytes // 4 if on_cuda else row_bytes)


def check_causal(valid: Tensor, n_valid: Tensor, last: Tensor, number: Tensor) -> None:
    """Refuse a mask that is more than causal with padding, which a grid of valid tokens cannot express.

    Args:
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        n_valid: int64 [B, Q], their numbers.
        last: bool [B or 1, T], the last query's keys.
        number: int64 [B or 1, T], their running count.

    Raises:
        ValueError: a query attends to other keys than the valid ones up to itself.
    """
    keys, counts = valid[:, 0, 0], n_valid[: len(valid), :, None]
    sees_later = counts[:, 0, 0] - 1 > keys.shape[2] - keys.shape[1]  # more tokens before the first query than slots
    for at in range(0, keys.shape[1], step := rows_that_fit(2 * len(keys) * keys.shape[2])):
        expected = last[:, None] & (number[:, None] <= counts[:, at : at + step])
        differs = (keys[:, at : at + step] != expected).flatten(1).any(1) | sees_later
        if differs.any():
            raise ValueError(
                f"the attention mask of row {int(differs.nonzero()[0])} is not causal with padding, as "
                "prefill='blocks' needs it; pass a mask [batch, length], or use prefill='dense'."
            )
