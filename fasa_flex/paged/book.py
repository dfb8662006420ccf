"""Which blocks of a paged cache hold which request, and what a forward must therefore pack, pack again and cover.

The manager of continuous batching moves blocks without telling attention: it shares them between requests, copies them
for a fork, frees them, and restores them from host memory. A `Book` compares the tables of blocks with those of the
last forward. A request whose table has changed other than by its own new tokens is packed again from its pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.completion import BLOCK
from fasa_flex.hf.continuous_batching import Request


class Places(NamedTuple):
    """Places of tokens in pages.

    Attributes:
        blocks: int64 [N], the block of each token.
        offsets: int64 [N], its place in the block.
    """

    blocks: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, table: Sequence[int], first: int, last: int, page: int, device: torch.device) -> Places:
        """Places of a request's tokens ``first`` to ``last - 1``."""
        tokens, begin = torch.arange(first, last), first // page
        blocks = torch.tensor(table[begin : -(-last // page)], dtype=torch.long)
        return cls(blocks[tokens // page - begin].to(device), (tokens % page).to(device))

    def rows(self, stride: int) -> Tensor:
        """Rows of the tokens in `Pages.keys`, int64 [N]."""
        return self.blocks * stride + self.offsets


class Cover(NamedTuple):
    """Tokens that a request's completion state takes in.

    Attributes:
        slot: row of the request's state.
        first: number of its tokens that the state covers already.
        places: the next tokens, complete blocks of 64.
    """

    slot: int
    first: int
    places: Places


class Plan(NamedTuple):
    """What one forward does in every layer of a group.

    Attributes:
        new: places of the new tokens, in the order of the packed row.
        again: places of earlier tokens whose packed keys are unknown; None: there are none.
        begun: slots of the states that begin empty.
        covers: tokens that states take in.
        slots: slot of each request's state, by its id.
    """

    new: Places
    again: Places | None
    begun: list[int]
    covers: list[Cover]
    slots: dict[str, int]


@dataclass(slots=True)
class _Record:
    """A request after the last forward: its blocks, its tokens, its state's slot, and the tokens that this covers."""

    blocks: list[int]
    end: int
    slot: int
    covered: int


class Book:
    """The requests in one paged cache, as of the last forward.

    Args:
        page: number of tokens in a block.
        device: device of the places.
    """

    def __init__(self, page: int, device: torch.device) -> None:
        self._page, self._device = page, device
        self._records: dict[str, _Record] = {}
        self._free: list[int] = []

    def plan(self, requests: Sequence[Request], tables: Mapping[str, list[int]]) -> Plan:
        """Compare the tables with those of the last forward, and write down those of this one.

        Args:
            requests: requests of the forward.
            tables: blocks of every request in the cache.
        """
        for name in [name for name in self._records if name not in tables]:  # finished, cancelled or evicted
            self._free.append(self._records.pop(name).slot)
        new: list[Places] = []
        again: list[Places] = []
        begun, covers, slots = [], [], {}
        for request in requests:
            table, used = tables[request.name], -(-request.past // self._page)
            record = self._records.get(request.name)
            if record is None:
                slot = self._free.pop() if self._free else len(self._records)
                record = self._records[request.name] = _Record([], -1, slot, 0)
            known = record.blocks if record.end == request.past else []
            if known[:used] != table[:used] or not request.past:
                changed = [at for at in range(used) if at >= len(known) or known[at] != table[at]]
                again.extend(self._places(table, at * self._page, self._end(at, request.past)) for at in changed)
                begun.append(record.slot)
                record.covered = 0
            target = request.end // BLOCK * BLOCK
            if target > record.covered:
                covers.append(Cover(record.slot, record.covered, self._places(table, record.covered, target)))
            record.blocks, record.end, record.covered = table[: -(-request.end // self._page)], request.end, target
            new.append(self._places(table, request.past, request.end))
            slots[request.name] = record.slot
        return Plan(_joined(new), _joined(again) if again else None, begun, covers, slots)

    @property
    def slots(self) -> int:
        """Number of slots that states need."""
        return len(self._records) + len(self._free)

    def _end(self, block: int, past: int) -> int:
        return min((block + 1) * self._page, past)

    def _places(self, table: Sequence[int], first: int, last: int) -> Places:
        return Places.of(table, first, last, self._page, self._device)


def _joined(places: Sequence[Places]) -> Places:
    return Places(torch.cat([each.blocks for each in places]), torch.cat([each.offsets for each in places]))
