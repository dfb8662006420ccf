"""State of a forward of continuous batching, which all layers share, and what is kept beside each paged cache."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.budget import Budget
from fasa_flex.core.config import Prefill
from fasa_flex.core.scoring import DominantChunks, SequenceScorer
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.continuous_batching import Pages, Request, pages_of, requests_of_forward
from fasa_flex.model.paged_parts import Group, Parts
from fasa_flex.model.stats import tally
from fasa_flex.paged.attention import rows_of_table
from fasa_flex.paged.book import Book, Plan
from fasa_flex.paged.pages import PackedPages, States, write_states


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
    """

    def __init__(
        self,
        cache: Any,
        requests: list[Request],
        length: int,
        device: torch.device,
        books: dict[int, Book],
        prefill_sparse: bool,
    ) -> None:
        self._cache = weakref.ref(cache)  # a thread keeps its last forward, which must not keep the cache
        self.requests, self.count = requests, sum(each.new for each in requests)
        self._device, self._books = device, books
        start, past, new, prompt = torch.tensor([each[1:] for each in requests]).unbind(1)
        number = torch.arange(1, self.count + 1) + (past - start).repeat_interleave(new)
        prompt = torch.zeros_like(number) if prefill_sparse else prompt.repeat_interleave(new)
        self._number, self._prompt = (F.pad(each[None], (0, length - self.count)) for each in (number, prompt))
        self._n_valid = self._number.to(device)
        self._plans: dict[int, Plan] = {}
        self._parts: dict[Budget, Parts] = {}
        self._tallies: dict[Budget | None, Tensor] = {}
        self._tables: dict[tuple[int, Group], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

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
        group = Group.of(self.requests, range(len(self.requests)), self._device)
        assert group is not None
        return group

    def plan(self, pages: Pages) -> Plan:
        """What the forward does beside these pages; the layers of a group share it."""
        group = id(pages.tables)
        if group not in self._plans:
            book = self._books.setdefault(group, Book(pages.page, pages.keys.device))
            self._plans[group] = book.plan(self.requests, pages.tables)
        return self._plans[group]

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

    def parts(self, budget: Budget) -> Parts:
        """Sort the requests by how they attend under a budget."""
        if budget not in self._parts:
            self._parts[budget] = self._sorted(budget)
        return self._parts[budget]

    def _sorted(self, budget: Budget) -> Parts:
        decoding, short = [], []
        alone: dict[int, Request] = {}
        first_sparse: dict[int, int] = {}
        sparse = (self._number > self._prompt) & budget.exceeded(self._number)
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
        sparse_ones, short_ones = (Group.of(self.requests, rows, self._device) for rows in (decoding, short))
        return Parts(sparse_ones, short_ones, alone, first_sparse, sparse.to(self._device))

    def tally(self, budget: Budget | None = None, sparse: Tensor | None = None) -> Tensor:
        """Count the forward for `FasaStats.add`."""
        if budget not in self._tallies:
            self._tallies[budget] = tally(self._n_valid, sparse, budget)
        return self._tallies[budget]


@dataclass(slots=True)
class Beside:
    """What one layer keeps beside the pages of one cache.

    Attributes:
        scorer: the scorer that packed the keys; None: nothing is packed.
        packed: packed keys; None: nothing is packed.
        states: completion states; None: there are none.
    """

    scorer: DominantChunks | None
    packed: PackedPages | None
    states: States | None

    def advance(self, pages: Pages, plan: Plan, key: Tensor, value: Tensor, written: bool, slots: int) -> None:
        """Write the new tokens (`write_states`), pack earlier keys that are not known, and extend the states."""
        if self.packed is not None and plan.again is not None:
            self.packed.write(pages.keys[plan.again.rows(pages.stride)], plan.again)
        write_states(pages, self.packed, key, value, plan.new, written)
        if self.states is not None:
            self.states.advance(pages, plan, slots)


class _OfCache:
    """What is kept of one cache: books of its requests, and by layer number its `Pages` and what is `Beside` them."""

    def __init__(self, scorers: Sequence[object]) -> None:
        self.scorers = scorers
        self.books: dict[int, Book] = {}
        self.pages: dict[int, Pages] = {}
        self.layers: dict[int, Beside] = {}


class PagedForwards:
    """Forwards of continuous batching of a model under FASA.

    Args:
        prefill: ``FasaConfig.prefill``.
        scorers: returns the scorer of every layer.
    """

    def __init__(self, prefill: Prefill, scorers: Callable[[], list[object]]) -> None:
        self._prefill, self._scorers = prefill, scorers
        self._local = threading.local()
        self._caches: weakref.WeakKeyDictionary[Any, _OfCache] = weakref.WeakKeyDictionary()

    @property
    def now(self) -> PagedForward:
        """The current forward of the calling thread."""
        forward: PagedForward = self._local.now
        return forward

    def begin(self, cache: Any, length: int, device: torch.device) -> None:
        """Begin a forward; with other scorers than in the cache's last forward all keys are packed again.

        Args:
            cache: the paged cache.
            length: N, tokens of the packed row with padding.
            device: device of the model's first layer.

        Raises:
            NotImplementedError: the forward is captured in a CUDA graph, which would replay without this call, or a
                scorer or the prefill needs a sequence by itself.
        """
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotSupportedError(
                "FASA attends to a paged cache outside of CUDA graphs only; pass "
                "ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        if self._prefill == "blocks":
            raise NotSupportedError(
                "prefill='blocks' reads one prompt a row, and continuous batching packs several; use prefill='dense'."
            )
        kept, used = self._caches.get(cache), self._scorers()
        follower = next((each for each in used if isinstance(each, SequenceScorer)), None)
        if follower is not None:
            raise NotSupportedError(
                f"{follower.name} follows one sequence from forward to forward, and continuous batching "
                "mixes several; use generate, or a Scorer."
            )
        if kept is None or any(a is not b for a, b in zip(kept.scorers, used, strict=True)):
            kept = self._caches[cache] = _OfCache(used)
        requests = requests_of_forward()
        self._local.now = PagedForward(cache, requests, length, device, kept.books, self._prefill == "sparse")

    def pages(self, cache: Any, layer: int) -> Pages:
        """The pages of layer number ``layer`` in a cache."""
        pages = self._caches[cache].pages
        if layer not in pages:
            pages[layer] = pages_of(cache, layer)
        return pages[layer]

    def beside(
        self, cache: Any, layer: int, pages: Pages, scorer: DominantChunks | None, completing: bool | None
    ) -> Beside:
        """What layer number ``layer`` keeps beside a cache; made on first use.

        Args:
            cache: the paged cache.
            layer: number of the layer.
            pages: its pages.
            scorer: packs its keys; None: nothing is kept.
            completing: whether states hold the covariance; None: there are no states.
        """
        layers = self._caches[cache].layers
        if layer not in layers:
            packed = None if scorer is None else PackedPages(pages, scorer)
            states = None if packed is None or completing is None else States(pages, completing)
            layers[layer] = Beside(scorer, packed, states)
        return layers[layer]

    @property
    def n_bytes(self) -> int:
        """Size of all packed pages in bytes."""
        packed = (beside.packed for kept in self._caches.values() for beside in kept.layers.values())
        return sum(each.keys.n_bytes for each in packed if each is not None)

    def clear(self) -> None:
        """Drop everything that is kept beside caches."""
        self._caches.clear()
        self._local = threading.local()
