"""The forwards of a model under FASA: what all layers of one have in common, and where its sparse queries begin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fasa_flex.caches.capacity import make_room
from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.forward_checks import check_forward
from fasa_flex.hf.generation import generating, reads_prompt
from fasa_flex.hf.masks import Shape
from fasa_flex.model.visible import Visible

_boundaries: ContextVar[Mapping[int, Boundary]] = ContextVar("fasa_boundaries")
"""Of `Forwards.sparse_from`, by the id of its `Forwards`: of this thread or task alone."""

_NONE: Mapping[int, Boundary] = {}


class _Forward(threading.local):
    """A thread's forward.

    Attributes:
        reads_prompt: whether a forward of one token reads the last of a prompt, and decodes nothing.
        boundary: where its sparse queries begin; None: `sparse_from` is not in use.
        traced_boundary: the same for Dynamo, which traces no `ContextVar`.
        nan_rows: bool [B], the rows whose padding holds NaN (`check_keys`); None: none does.
    """

    reads_prompt: bool = False
    boundary: Boundary | None = None
    traced_boundary: Boundary | None = None
    nan_rows: Tensor | None = None


class Forwards:
    """What the layers of a model under FASA share, forward by forward.

    Args:
        check: refuses to go on where the model's attention is routed no longer.
        limit: the longest sequence that the model takes; None: it states none.

    Attributes:
        now: the forward of the thread that asks.
    """

    def __init__(self, check: Callable[[], None], limit: int | None) -> None:
        self._check, self._limit = check, limit
        self.now = _Forward()
        self._threads = set[int]()
        self._step: tuple[Visible, bool] | None = None

    @property
    def boundary(self) -> Boundary | None:
        """Where the sparse queries of this thread's forward begin."""
        return self.now.traced_boundary if torch.compiler.is_compiling() else self.now.boundary

    def begin(self, batch: int, q_len: int, cache: Cache | None, layer: int, options: dict[str, Any]) -> None:
        """Before any layer of the cache is written to: refuse a forward that cannot end well, and make room for it.

        Args:
            batch: rows.
            q_len: tokens that each adds.
            cache: to be written to; None: the forward has none.
            layer: the first that is written to.
            options: keyword arguments of the attention module.

        Raises:
            ValueError: as of `check_forward` and `make_room`.
        """
        self._check()
        now = self.now
        if not torch.compiler.is_compiling():
            self._threads.add(threading.get_ident())
            now.reads_prompt = q_len == 1 and reads_prompt()
            now.boundary, now.nan_rows = _boundaries.get(_NONE).get(id(self)), None
        check_forward(batch, q_len, cache, layer, options, self.boundary, self._limit)
        if cache is not None:
            make_room(cache, q_len)

    def visible(self, mask: Tensor | None, shape: Shape, device: torch.device, begins: bool) -> Visible:
        """The valid keys of a forward's queries; those of a decode step are the same object for all of its layers.

        A step is known by its mask and begins at the first layer: a mask may be written to between two steps. Nothing
        is kept of a forward of several tokens, whose masks are large, nor in a compiled graph, which finds common
        expressions by itself. Concurrent forwards overwrite each other's; each then computes its own again.

        Args:
            mask: as for `valid_from_mask`.
            shape: likewise.
            device: of the results.
            begins: whether the forward's first layer asks.
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
        """As `Fasa.sparse_from`."""
        boundary, former = Boundary.of(start, stop), self.now.traced_boundary
        token = _boundaries.set({**_boundaries.get(_NONE), id(self): boundary})
        self.now.traced_boundary = boundary
        try:
            yield
        finally:
            self.now.traced_boundary = former
            _boundaries.reset(token)

    def interrupted(self) -> int:
        """How many other threads generate now."""
        return generating(self._threads - {threading.get_ident()})
