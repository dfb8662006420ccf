"""Which blocks of a paged cache hold which request, and what a forward must therefore pack, pack again and cover.

The manager of continuous batching moves blocks without telling attention: it shares them between requests, copies them
for a fork, frees them, and restores them from host memory. A `Book` compares the tables of blocks with those of the
last forward. A request whose table has changed other than by its own new tokens is packed again from its pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fasa_flex.core.budget import SINKS
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

    def rows(self, stride: int) -> Tensor:
        """Rows of the tokens in `Pages.keys`, int64 [N]."""
        return self.blocks * stride + self.offsets


class Cover(NamedTuple):
    """Tokens that completion states take in: L of each of M requests.

    Attributes:
        slots: int64 [M], rows of the requests' states.
        covered: int64 [M], number of tokens up to the last of them.
        places: of the M * L tokens, request by request.
    """

    slots: Tensor
    covered: Tensor
    places: Places


class Plan(NamedTuple):
    """What one forward does in every layer of a group; R requests have N tokens in the packed row.

    Attributes:
        table: int64 [R, n], the blocks of each request; entries behind its last block have no meaning.
        slots: int64 [R], slot of each request's state.
        lengths: int64 [R], number of tokens of each request.
        new: places of the new tokens, in the order of the packed row.
        again: places of earlier tokens whose packed keys are unknown; None: there are none.
        begun: int64, slots of the states that begin empty; None: there are none.
        covers: tokens that states take in, by their number.
    """

    table: Tensor
    slots: Tensor
    lengths: Tensor
    new: Places
    again: Places | None
    begun: Tensor | None
    covers: list[Cover]


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
        device: device of the plans.
    """

    def __init__(self, page: int, device: torch.device) -> None:
        self._page, self._device = page, device
        self._records: dict[str, _Record] = {}
        self._free: list[int] = []
        self._blocks = torch.zeros(1, 1, dtype=torch.long)  # of every record, by its slot

    def plan(self, requests: Sequence[Request], tables: Mapping[str, list[int]]) -> Plan:
        """Compare the tables with those of the last forward, and write down those of this one.

        All that layers read is copied to the device here, once.

        Args:
            requests: requests of the forward.
            tables: blocks of every request in the cache.
        """
        for name in [name for name in self._records if name not in tables]:  # finished, cancelled or evicted
            self._free.append(self._records.pop(name).slot)
        again: list[tuple[int, int, int]] = []
        begun: list[int] = []
        covers: dict[int, list[tuple[int, int, int]]] = {}
        for request in requests:
            table, used = tables[request.name], -(-request.past // self._page)
            record = self._records.get(request.name)
            if record is None:
                slot = self._free.pop() if self._free else len(self._records)
                record = self._records[request.name] = _Record([], -1, slot, 0)
            known = record.blocks if record.end == request.past else []
            if known[:used] != table[:used] or not request.past:
                changed = [at for at in range(used) if at >= len(known) or known[at] != table[at]]
                again.extend((record.slot, at * self._page, min((at + 1) * self._page, request.past)) for at in changed)
                begun.append(record.slot)
                record.covered = 0
            target = request.end // BLOCK * BLOCK
            if target > record.covered:
                first = record.covered or SINKS
                covers.setdefault(target - first, []).append((record.slot, first, target))
            self._note(record, table[: -(-request.end // self._page)])
            record.end, record.covered = request.end, target
        slots = [self._records[request.name].slot for request in requests]
        most = max(len(self._records[request.name].blocks) for request in requests)
        slot_of, lengths = torch.tensor([slots, [request.end for request in requests]]).to(self._device)
        return Plan(
            self._blocks[slots, :most].to(self._device),
            slot_of,
            lengths,
            self._places((slot, each.past, each.end) for slot, each in zip(slots, requests, strict=True)),
            self._places(again) if again else None,
            torch.tensor(begun).to(self._device) if begun else None,
            [self._cover(of_one_size) for of_one_size in covers.values()],
        )

    @property
    def slots(self) -> int:
        """Number of slots that states need."""
        return len(self._records) + len(self._free)

    def _note(self, record: _Record, blocks: list[int]) -> None:
        """Write down the blocks of a request."""
        rows, width = self._blocks.shape
        if record.slot >= rows or len(blocks) > width:
            grown = torch.zeros(max(2 * rows, record.slot + 1), max(2 * width, len(blocks)), dtype=torch.long)
            grown[:rows, :width] = self._blocks
            self._blocks = grown
        same = min(len(blocks), len(record.blocks))
        if blocks[:same] != record.blocks[:same]:
            same = 0
        if len(blocks) > same:
            self._blocks[record.slot, same : len(blocks)] = torch.tensor(blocks[same:])
        record.blocks = blocks

    def _cover(self, spans: Sequence[tuple[int, int, int]]) -> Cover:
        slots, _, targets = torch.tensor(spans).to(self._device).unbind(1)
        return Cover(slots, targets, self._places(spans))

    def _places(self, spans: Iterable[tuple[int, int, int]]) -> Places:
        """Places of tokens ``first`` to ``last - 1`` of the records in slots."""
        slots, first, last = torch.tensor(list(spans)).unbind(1)
        counts = last - first
        ends = counts.cumsum(0)
        token = torch.arange(int(ends[-1])) + (last - ends).repeat_interleave(counts)
        blocks = self._blocks[slots.repeat_interleave(counts), token // self._page]
        return Places(*torch.stack([blocks, token % self._page]).to(self._device))
