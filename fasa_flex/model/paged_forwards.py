"""Forwards of continuous batching, eager or captured in CUDA graphs, and what is kept beside each paged cache."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasa_flex.core.completion import CompletionState
from fasa_flex.core.config import Prefill
from fasa_flex.core.scoring import DominantChunks, SequenceScorer
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.continuous_batching import Capture, Pages, capture_of_forward, pages_of, requests_of_forward
from fasa_flex.model.paged_forward import PagedForward
from fasa_flex.paged.book import Book, Plan, Room
from fasa_flex.paged.pages import PackedPages, States, write_states


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

    def holds(self, slots: int, state: CompletionState | None) -> bool:
        """Whether ``state`` is that of the layer still, with room for so many requests."""
        return self.states is None or (state is self.states.all and slots <= len(state.covered))

    def begin(self, pages: Pages, plan: Plan, slots: int) -> None:
        """Pack earlier keys whose packed keys are not known, and begin states."""
        if self.packed is not None and plan.again is not None:
            self.packed.write(pages.keys[plan.again.rows(pages.stride)], plan.again)
        if self.states is not None:
            self.states.begin(pages, plan, slots)

    def advance(self, pages: Pages, plan: Plan, key: Tensor, value: Tensor, written: bool) -> None:
        """Write the new tokens (`write_states`), and extend the states."""
        write_states(pages, self.packed, key, value, plan.new, written)
        if self.states is not None:
            self.states.advance(pages, plan)


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

    def begin(self, cache: Any, layer: int, length: int, device: torch.device, table: Tensor | None) -> None:
        """Begin a forward; with other scorers than in the cache's last forward all keys are packed again.

        Args:
            cache: the paged cache.
            layer: number of the model's first attention layer.
            length: N, tokens of the packed row with padding.
            device: that layer's.
            table: the manager's table of blocks, [.., n], of a forward in which each request has one new token; None:
                it has none.

        Raises:
            NotImplementedError: the forward is captured in a CUDA graph, but not as a step of decoding, or a scorer or
                the prefill needs a sequence by itself.
        """
        capture = capture_of_forward()
        if capture is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotSupportedError(
                "FASA attends to a paged cache in a manager's own CUDA graphs only; capture no others."
            )
        if capture is not None and table is None:
            raise NotSupportedError(
                "FASA serves CUDA graphs of steps of decoding with a table of blocks, and this one has prompts or no "
                "table; pass ContinuousBatchingConfig(use_cuda_graph=(False, True))."
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
        if kept is None or not self._serves(kept):
            kept = self._caches[cache] = _OfCache(used)
        if capture is not None and capture.graph is not None:
            self._keep(cache, kept, capture)
            return
        shaping = capture is not None and getattr(self._local, "shaping", False)
        requests = [] if shaping else requests_of_forward(real=capture is not None)
        if capture is not None and requests:  # the graph's forward runs first, by itself, and then theirs
            self._local.shaping = True
            try:
                capture.run()
            finally:
                self._local.shaping = False
        room = None
        if table is not None and not requests:
            pages = self.pages(cache, layer)
            room = Room(length, table.shape[-1] * pages.page, pages.trash)
        forward = PagedForward(cache, requests, length, device, kept.books, self._prefill == "sparse", room)
        self._local.now = forward
        if room is not None:
            self._local.shaped = forward

    def _serves(self, kept: _OfCache) -> bool:
        """Whether the layers have the scorers still that packed the keys."""
        return all(a is b for a, b in zip(kept.scorers, self._scorers(), strict=True))

    def _keep(self, cache: Any, kept: _OfCache, capture: Capture) -> None:
        """Go through the layers for a graph, which from now on asks `_replay` before it replays.

        Its forward is one of no requests, which ran before: its tensors are there, and the kernels are compiled.
        """
        forward: PagedForward = self._local.shaped
        forward.captured()
        self._local.now = forward
        states = {layer: None if each.states is None else each.states.all for layer, each in kept.layers.items()}
        former = capture._replace(graph=capture.graph.replay)
        capture.graph.replay = functools.partial(self._replay, weakref.ref(cache), kept, states, forward, former)

    def _replay(
        self,
        cache: Callable[[], Any],
        kept: _OfCache,
        states: dict[int, CompletionState | None],
        forward: PagedForward,
        capture: Capture,
    ) -> None:
        """Replay a graph for the manager's current batch.

        A batch with the last token of a prompt, which is dense, runs without a graph. A graph that reads what is there
        no more is captured again.

        Args:
            cache: returns the paged cache.
            kept: what was kept of it when the graph was captured.
            states: the completion states of its layers then, which move when they grow.
            forward: the captured forward.
            capture: how it was captured; its ``graph`` replays it.
        """
        if self._caches.get(cache()) is not kept or not self._serves(kept):
            capture.again()
            return
        requests = requests_of_forward(real=True)
        if self._prefill == "dense" and any(each.past < each.prompt for each in requests):
            capture.run()
            return
        forward.renew(requests)
        layers = [(kept.pages[layer], states[layer], beside) for layer, beside in kept.layers.items()]
        if not all(beside.holds(forward.slots(pages), state) for pages, state, beside in layers):
            capture.again()
            return
        for pages, _, beside in layers:
            beside.begin(pages, forward.plan(pages), 0)
        capture.graph()

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
