"""One forward of continuous batching: what its layers share, and what a CUDA graph keeps of it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.budget import Budget
from fasa_flex.hf.continuous_batching import Pages, Request
from fasa_flex.model.paged_parts import Group, Parts
from fasa_flex.model.stats import tally
from fasa_flex.paged.attention import rows_of_table
from fasa_flex.paged.book import Book, Plan, Room, on_device


class PagedForward:
    """One forward of continuous batching.

    Attributes:
        requests: its requests, in the order of the packed row.
        count: number of new tokens; the packed row may be padded behind them.

    Args:
        cache: the paged cache.
        requests: its requests.
        length: N, tokens of the packed row with padding.
        device: device of the model's first layer.
        books: books of the cache, by the id of a group's tables.
        prefill_sparse: whether prompt tokens are sparse, too.
        room: shapes of a forward that a CUDA graph captures, in which every request decodes; None: there is no graph.
    """

    def __init__(
        self,
        cache: Any,
        requests: list[Request],
        length: int,
        device: torch.device,
        books: dict[int, Book],
        prefill_sparse: bool,
        room: Room | None,
    ) -> None:
        self._cache = weakref.ref(cache)  # a thread keeps its last forward, which must not keep the cache
        self._length, self._device, self._books, self._prefill_sparse = length, device, books, prefill_sparse
        self.room = room
        self._note(requests)
        self._lengths = self._ends()
        self._plans: dict[int, tuple[Mapping[str, list[int]], Plan]] = {}  # not their pages, which keep the cache
        self._parts: dict[Budget, Parts] = {}
        self._tallies: dict[Budget | None, Tensor] = {}
        self._tables: dict[tuple[int, Group], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._causal: dict[int, Tensor] = {}

    def _note(self, requests: list[Request]) -> None:
        """Note the requests, and the number and the prompt's length of each token of the row, on the host."""
        self.requests = requests
        start, past, new, prompt = torch.tensor([each[1:] for each in requests], dtype=torch.long).view(-1, 4).unbind(1)
        count = sum(each.new for each in requests)
        number = torch.arange(1, count + 1) + (past - start).repeat_interleave(new)
        prompt = torch.zeros_like(number) if self._prefill_sparse else prompt.repeat_interleave(new)
        self._number, self._prompt = (F.pad(each[None], (0, self._length - count)) for each in (number, prompt))
        self.count = self._length if self.room else count

    def _ends(self) -> Tensor:
        """Number of keys of each request, int64 [R]."""
        ends = [each.end for each in self.requests]
        return on_device(torch.tensor(ends + [0] * (self.room.rows - len(ends) if self.room else 0)), self._device)

    def captured(self) -> None:
        """Go through the layers again, for a CUDA graph: compute what they share from the tensors that are kept."""
        self._parts.clear()
        self._tables.clear()
        self.__dict__.pop("every", None)

    def renew(self, requests: list[Request]) -> None:
        """Become the forward of other requests, in the same tensors."""
        self._note(requests)
        self._lengths.copy_(self._ends())
        for tables, plan in self._plans.values():
            plan.renew(self._books[id(tables)].plan(requests, tables, plan.room))
        for budget, counted in self._tallies.items():
            counted.copy_(self._count(budget))

    @property
    def cache(self) -> Any:
        """The paged cache, while the forward runs."""
        return self._cache()

    @property
    def longest_prompt(self) -> int | None:
        """Row of the request with the longest prompt among those that end it in several tokens; None: none does."""
        ending = [row for row, each in enumerate(self.requests) if each.end == each.prompt and each.new > 1]
        return max(ending, key=lambda row: self.requests[row].end, default=None)

    @cached_property
    def every(self) -> Group:
        """All requests of a forward in which each has one new token."""
        if self.room is not None:
            rows = slice(0, self.room.rows)
            return Group(rows, rows, self._lengths, self.room.tokens)
        group = Group.of(self.requests, range(len(self.requests)), self._lengths)
        assert group is not None
        return group

    def plan(self, pages: Pages) -> Plan:
        """What the forward does beside these pages; the layers of a group share it."""
        group = id(pages.tables)
        if group not in self._plans:
            book = self._books.setdefault(group, Book(pages.page, pages.keys.device))
            self._plans[group] = pages.tables, book.plan(self.requests, pages.tables, self.room)
        return self._plans[group][1]

    def slots(self, pages: Pages) -> int:
        """Number of states that a layer with these pages holds."""
        return self._books[id(pages.tables)].slots

    def table(self, pages: Pages, group: Group) -> Tensor:
        """Blocks of a group's requests, int64 [B, n], for the longest of them."""
        key = id(pages.tables), group
        if key not in self._tables:
            self._tables[key] = self.plan(pages).table[group.rows, : -(-group.longest // pages.page)]
        return self._tables[key]

    def rows_of(self, pages: Pages, row: int) -> Tensor:
        """Rows of all tokens of one request in `Pages.keys`, int64 [T]."""
        key = id(pages.tables), row
        if key not in self._rows:
            end, table = self.requests[row].end, self.plan(pages).table[row]
            self._rows[key] = rows_of_table(table[None, : -(-end // pages.page)], pages)[0, :end]
        return self._rows[key]

    def causal(self, row: int) -> Tensor:
        """The keys that each new token of one request may attend to, bool [1, 1, Q, T]."""
        if row not in self._causal:
            request = self.requests[row]
            every = torch.ones(request.new, request.end, dtype=torch.bool, device=self._device)
            self._causal[row] = every.tril(request.past)[None, None]
        return self._causal[row]

    def parts(self, budget: Budget) -> Parts:
        """Sort the requests by how they attend under a budget."""
        if budget not in self._parts:
            self._parts[budget] = self._sorted(budget)
        return self._parts[budget]

    def _sorted(self, budget: Budget) -> Parts:
        sparse = self._sparse(budget)
        if self.room is not None:  # also requests whose keys the budget covers: a replay may have others
            return Parts(self.every, None, {}, {}, sparse)
        decoding, short = [], []
        alone: dict[int, Request] = {}
        first_sparse: dict[int, int] = {}
        chosen = sparse[0].tolist()
        for row, each in enumerate(self.requests):
            if each.new == 1 and chosen[each.start]:
                decoding.append(row)
            elif each.new == 1 and budget.covers(each.end):
                short.append(row)
            else:
                alone[row] = each
                if any(chosen[each.tokens]):
                    first_sparse[row] = chosen.index(True, each.start) - each.start
        sparse_ones, short_ones = (Group.of(self.requests, rows, self._lengths) for rows in (decoding, short))
        return Parts(sparse_ones, short_ones, alone, first_sparse, sparse)

    def _sparse(self, budget: Budget) -> Tensor:
        return (self._number > self._prompt) & budget.exceeded(self._number)

    def tally(self, budget: Budget | None = None) -> Tensor:
        """Count the forward for `FasaStats.add`; ``budget``: that of a layer with sparse queries."""
        if budget not in self._tallies:
            self._tallies[budget] = self._count(budget)
        return self._tallies[budget]

    def _count(self, budget: Budget | None) -> Tensor:
        return on_device(tally(self._number, None if budget is None else self._sparse(budget), budget), self._device)
