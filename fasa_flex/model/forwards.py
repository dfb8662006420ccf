"""State of a forward of a model under FASA: its valid keys, which all layers share, and its first sparse query."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fasa_flex.caches.capacity import last_written, make_room, partly_written, take_back
from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.forward_checks import check_forward
from fasa_flex.hf.generation import generating, reads_prompt
from fasa_flex.hf.masks import Shape
from fasa_flex.model.visible import Visible
from fasa_flex.prefill.grid import Grid

_boundaries: ContextVar[Mapping[int, Boundary]] = ContextVar("fasa_boundaries")
"""Boundaries that `Forwards.sparse_from` set in this thread or asyncio task, by the id of the `Forwards`."""

_NONE: Mapping[int, Boundary] = {}


class _Forward(threading.local):
    """The current forward of one thread.

    Attributes:
        reads_prompt: whether a forward of one token reads the last prompt token instead of decoding.
        boundary: slots of the sparse queries; None: `sparse_from` is not in use.
        traced_boundary: a copy of ``boundary`` for Dynamo, which cannot trace a `ContextVar`.
        nan_rows: bool [B], the batch rows whose padding holds NaN (`check_keys`); None: no row.
        grid: blocks of a prefill by blocks, with the mask and shape that they belong to; None: not made yet.
    """

    reads_prompt: bool = False
    boundary: Boundary | None = None
    traced_boundary: Boundary | None = None
    nan_rows: Tensor | None = None
    grid: tuple[weakref.ref[Tensor] | None, Shape, Grid | None] | None = None


class Forwards:
    """The state of forwards that the layers of a model under FASA share.

    Args:
        check: raises an error if the model's attention is no longer routed through FASA.
        limit: maximum sequence length of the model in tokens; None: the model states none.

    Attributes:
        now: the current forward of the calling thread.
        waited: number of uncompiled forwards of one token a row; on a GPU they wait for Python.
    """

    def __init__(self, check: Callable[[], None], limit: int | None) -> None:
        self._check, self._limit = check, limit
        self.now = _Forward()
        self._threads = set[int]()
        self._step: tuple[Visible, bool] | None = None
        self.waited = 0

    @property
    def boundary(self) -> Boundary | None:
        """Slots of the sparse queries in this thread's forward; None: `sparse_from` is not in use."""
        return self.now.traced_boundary if torch.compiler.is_compiling() else self.now.boundary

    def begin(self, batch: int, q_len: int, cache: Cache | None, layer: int, options: dict[str, Any]) -> None:
        """Check a forward and reserve cache space before any layer of the cache is written.

        Args:
            batch: B, batch rows.
            q_len: Q, tokens that each row adds.
            cache: cache that the forward writes to; None: the forward has none.
            layer: number of the first layer that is written.
            options: keyword arguments of the attention module.

        Raises:
            ValueError: `check_forward` or `make_room` refuses the forward.
        """
        self._check()
        now = self.now
        if not torch.compiler.is_compiling():
            self._threads.add(threading.get_ident())
            now.reads_prompt = q_len == 1 and reads_prompt()
            now.boundary, now.nan_rows, now.grid = _boundaries.get(_NONE).get(id(self)), None, None
            self.waited += q_len == 1
        try:
            check_forward(batch, q_len, cache, layer, options, self.boundary, self._limit)
            if cache is not None:
                make_room(cache, q_len)
        except ValueError as error:
            last = -1 if cache is None else last_written(cache, layer)
            if cache is None or last < 0 or take_back(cache, last, q_len):
                raise
            raise partly_written(error, last) from error

    def visible(self, mask: Tensor | None, shape: Shape, device: torch.device, begins: bool) -> Visible:
        """Return the valid keys of a forward's queries; the layers of a decode step share one object.

        The object is reused while the mask tensor is the same, and made again at the first layer, since a mask may be
        written to between two steps. It is not kept for a forward of several tokens, whose masks are large, nor in a
        compiled graph, since the compiler merges equal expressions. Concurrent forwards overwrite each other's entry;
        each then computes its own again.

        Args:
            mask: mask of the attention call, as in `valid_from_mask`.
            shape: B, Q and T.
            device: device of the results.
            begins: whether the caller is the first layer of the forward.
        """
        if shape[1] > 1 or torch.compiler.is_compiling():
            return Visible(mask, shape, device)
        inference = torch.is_inference_mode_enabled()
        if self._step is not None and not begins:
            step, of_inference = self._step
            if step.mask is mask and step.shape == shape and step.device == device and inference == of_inference:
                return step
        step = Visible(mask, shape, device)
        self._step = (step, inference)
        return step

    @contextmanager
    def sparse_from(self, start: Tensor, stop: Tensor | None) -> Iterator[None]:
        """Set the boundary of this thread's forwards; see `Fasa.sparse_from`."""
        boundary, former = Boundary.of(start, stop), self.now.traced_boundary
        token = _boundaries.set({**_boundaries.get(_NONE), id(self): boundary})
        self.now.traced_boundary = boundary
        try:
            yield
        finally:
            self.now.traced_boundary = former
            _boundaries.reset(token)

    def interrupted(self) -> int:
        """Number of other threads that are in `generate` now."""
        return generating(self._threads - {threading.get_ident()})
