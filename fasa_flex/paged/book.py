"""Which blocks of a paged cache hold which request, and what a forward must therefore pack, pack again and cover.

The manager of continuous batching moves blocks without telling attention: it shares them between requests, copies them
for a fork, frees them, and restores them from host memory. A `Book` compares the tables of blocks with those of the
last forward. A request whose table has changed other than by its own new tokens is packed again from its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


@dataclass(eq=False)
class Plan:
    """What one forward does in every layer of a group; R requests have N tokens in the packed row.

    Attributes:
        table: int64 [R, n], the blocks of each request; entries behind its last block have no meaning.
        slots: int64 [R], slot of each request's state.
        lengths: int64 [R], number of tokens of each request.
        new: places of the new tokens, in the order of the packed row.
        again: places of earlier tokens whose packed keys are unknown; None: there are none.
        begun: int64, slots of the states that begin empty; None: there are none.
        covering: returns `covers`; None: states take in no tokens.
        room: the shapes that the tensors are padded to; None: they are not.
    """

    table: Tensor
    slots: Tensor
    lengths: Tensor
    new: Places
    again: Places | None
    begun: Tensor | None
    covering: Callable[[], list[Cover]] | None
    room: Room | None = None

    @cached_property
    def covers(self) -> list[Cover]:
        """The tokens that states take in, by their number."""
        return self.covering() if self.covering else []

    def renew(self, other: Plan) -> None:
        """Become another plan of the same room, in the same tensors."""
        for mine, its in zip((self.table, self.slots, self.lengths, *self.new), other.tensors, strict=True):
            mine.copy_(its)
        self.again, self.begun = other.again, other.begun

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that every plan has."""
        return self.table, self.slots, self.lengths, *self.new


class Room(NamedTuple):
    """Shapes of a forward that a CUDA graph replays for other requests.

    Attributes:
        rows: number of requests, and of their tokens.
        tokens: most tokens of a request.
        trash: block that tokens of no request are written to.
    """

    rows: int
    tokens: int
    trash: int


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
        self._blocks = torch.zeros(1, 1, dtype=torch.long)  # of every record, by its slot; slot 0 is of no request

    def plan(self, requests: Sequence[Request], tables: Mapping[str, list[int]], room: Room | None = None) -> Plan:
        """Compare the tables with those of the last forward, and write down those of this one.

        All that layers read is copied to the device here, once.

        Args:
            requests: requests of the forward.
            tables: blocks of every request in the cache.
            room: shapes to pad the tensors to; None: they are as large as the forward needs.
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
                slot = self._free.pop() if self._free else len(self._records) + 1
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
        spans = [(slot, each.past, each.end) for slot, each in zip(slots, requests, strict=True)]
        lengths = [each.end for each in requests]
        width = -(-(room.tokens if room else max(lengths)) // self._page)
        self._grow(0, width)
        none = [0] * (room.rows - len(slots) if room else 0)
        slot_of, length_of = on_device(torch.tensor([slots + none, lengths + none]), self._device)
        return Plan(
            on_device(self._blocks[slots + none, :width], self._device),
            slot_of,
            length_of,
            self._places(spans, (len(none), room.trash) if room else (0, 0)),
            self._places(again) if again else None,
            on_device(torch.tensor(begun), self._device) if begun else None,
            (lambda: [self._cover(of_one_size) for of_one_size in covers.values()]) if covers else None,
            room,
        )

    @property
    def slots(self) -> int:
        """Number of slots that states need."""
        return len(self._records) + len(self._free) + 1

    def _grow(self, slot: int, width: int) -> None:
        """Make room for the blocks of a slot."""
        rows, columns = self._blocks.shape
        if slot >= rows or width > columns:
            grown = torch.zeros(max(2 * rows, slot + 1), max(2 * columns, width), dtype=torch.long)
            grown[:rows, :columns] = self._blocks
            self._blocks = grown

    def _note(self, record: _Record, blocks: list[int]) -> None:
        """Write down the blocks of a request."""
        self._grow(record.slot, len(blocks))
        same = min(len(blocks), len(record.blocks))
        if blocks[:same] != record.blocks[:same]:
            same = 0
        if len(blocks) > same:
            self._blocks[record.slot, same : len(blocks)] = torch.tensor(blocks[same:])
        record.blocks = blocks

    def _cover(self, spans: Sequence[tuple[int, int, int]]) -> Cover:
        slots, _, targets = on_device(torch.tensor(spans), self._device).unbind(1)
        return Cover(slots, targets, self._places(spans))

    def _places(self, spans: Sequence[tuple[int, int, int]], more: tuple[int, int] = (0, 0)) -> Places:
        """Places of tokens ``first`` to ``last - 1`` of the records in slots, and of ``more`` in a block."""
        slots, first, last = torch.tensor(spans, dtype=torch.long).view(-1, 3).unbind(1)
        counts = last - first
        token = torch.arange(int(counts.sum())) + (last - counts.cumsum(0)).repeat_interleave(counts)
        blocks = self._blocks[slots.repeat_interleave(counts), token // self._page]
        number, trash = more
        blocks, offsets = F.pad(blocks, (0, number), value=trash), F.pad(token % self._page, (0, number))
        return Places(*on_device(torch.stack([blocks, offsets]), self._device))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; on a GPU without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
