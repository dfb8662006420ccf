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

from fasa_flex.core.budget import Budget
from fasa_flex.core.config import Prefill
from fasa_flex.core.scoring import DominantChunks, SequenceScorer
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.continuous_batching import Pages, Request, requests_of_forward
from fasa_flex.model.paged_parts import Group, Parts
from fasa_flex.model.stats import tally
from fasa_flex.paged.book import Book, Plan
from fasa_flex.paged.pages import PackedPages, States


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
        self._length, self._device, self._books, self._prefill_sparse = length, device, books, prefill_sparse
        numbers = [number for each in requests for number in range(each.past + 1, each.end + 1)]
        self._n_valid = torch.tensor([numbers + [0] * (length - self.count)], device=device)
        self._plans: dict[int, Plan] = {}
        self._parts: dict[Budget, Parts] = {}
        self._tallies: dict[Budget | None, Tensor] = {}
        self._tables: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    @property
    def cache(self) -> Any:
        """The paged cache, while the forward runs."""
        return self._cache()

    @property
    def longest_prompt(self) -> Request | None:
        """The request with the longest prompt among those that end their prompt in several tokens; None: none does."""
        ending = [each for each in self.requests if each.end == each.prompt and each.new > 1]
        return max(ending, key=lambda each: each.end, default=None)

    @cached_property
    def every(self) -> Group:
        """All requests of a forward in which each has one new token."""
        group = Group.of(self.requests, self._device)
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

    def state_slots(self, pages: Pages, requests: Sequence[Request]) -> Tensor:
        """Slots of the requests' states, int64 [B]."""
        slots = self.plan(pages).slots
        return torch.tensor([slots[each.name] for each in requests], device=pages.keys.device)

    def table(self, pages: Pages, requests: Sequence[Request]) -> Tensor:
        """Blocks of the requests, int64 [B, n]; shorter rows repeat their first block."""
        key = id(pages.tables), tuple(each.name for each in requests)
        if key not in self._tables:
            rows = [pages.tables[each.name][: -(-each.end // pages.page)] for each in requests]
            most = max(map(len, rows))
            padded = [row + row[:1] * (most - len(row)) for row in rows]
            self._tables[key] = torch.tensor(padded, dtype=torch.long).to(pages.keys.device)
        return self._tables[key]

    def parts(self, budget: Budget) -> Parts:
        """Sort the requests by how they attend under a budget."""
        if budget not in self._parts:
            self._parts[budget] = self._sorted(budget)
        return self._parts[budget]

    def _sorted(self, budget: Budget) -> Parts:
        decoding, short, alone = [], [], []
        mixed, sparse = [], [False] * self._length
        for each in self.requests:
            prompt = 0 if self._prefill_sparse else each.prompt
            chosen = [at >= prompt and not budget.covers(at + 1) for at in range(each.past, each.end)]
            sparse[each.tokens] = chosen
            if each.new == 1 and chosen[0]:
                decoding.append(each)
            elif each.new == 1 and budget.covers(each.end):
                short.append(each)
            else:
                alone.append(each)
                if any(chosen):
                    mixed.append(each)
        groups = Group.of(decoding, self._device), Group.of(short, self._device)
        return Parts(*groups, alone, mixed, torch.tensor([sparse], device=self._device))

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

    def advance(self, pages: Pages, plan: Plan, keys: Tensor, slots: int) -> None:
        """Pack the new ``keys`` [N, Hkv, D] and those whose packed keys are unknown, and extend the states."""
        if self.packed is None:
            return
        if plan.again is not None:
            self.packed.write(pages.keys[plan.again.rows(pages.stride)], plan.again)
        self.packed.write(keys, plan.new)
        if self.states is not None:
            self.states.advance(pages, plan, slots)


class _OfCache:
    """What is kept beside one cache: books of its requests, and `Beside` by layer number."""

    def __init__(self, scorers: Sequence[object]) -> None:
        self.scorers = scorers
        self.books: dict[int, Book] = {}
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
        return sum(each.n_bytes for each in packed if each is not None)

    def clear(self) -> None:
        """Drop everything that is kept beside caches."""
        self._caches.clear()
        self._local = threading.local()
