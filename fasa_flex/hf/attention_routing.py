"""The attention seam: routes a model's attention calls through another function, and back.

transformers looks up the attention function by a name in the attention module's config. The seam gives each attention
module a copy of its config with the seam's name, and stores a route on the module; it patches no class or method. The
model's own config keeps its name. So masks are made as without the seam, other models that share the config are not
affected, and continuous batching, which accepts a few names in the model's config only, accepts the model.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from fasa_flex.hf.attention_call import AttentionCall, AttentionResult, DenseAttention
from fasa_flex.hf.compatibility import IMPLEMENTATIONS
from fasa_flex.hf.model_structure import OWN_CONFIG, attention_lookup, attention_modules, own_config

_OURS = "fasa_"
_ROUTE = "_fasa_route"

SeamFunction = Callable[[AttentionCall], AttentionResult]
"""A function that a seam routes calls through."""

_tokens = itertools.count()
_lock = threading.RLock()
_open: dict[int, tuple[str, frozenset[int]]] = {}
"""Owner and module ids of every open seam, by its token."""


class _Route(NamedTuple):
    """The way of one layer's calls."""

    layer: int
    function: SeamFunction
    dense: DenseAttention


class AttentionSeam:
    """Route every attention call of a model's layers through a function, from `open` until `close`.

    Args:
        model: the model whose layers (`attention_modules`) are routed.
        function: the function to call instead; one for all layers, or one for each layer number.
        owner: description of the caller, for the error that a second seam on the model raises.

    Raises:
        ValueError: the model's attention cannot be replaced by name, or is routed already.
    """

    def __init__(
        self, model: PreTrainedModel, function: SeamFunction | Mapping[int, SeamFunction], owner: str = "a calibration"
    ) -> None:
        by_layer = attention_modules(model)
        modules = list(by_layer.values())
        self._kind, self._owner, self._token = type(model).__name__, owner, next(_tokens)
        self._check_free(modules)
        self._configs: list[tuple[PreTrainedConfig, str]] = []
        self._routes: list[tuple[weakref.ref[nn.Module], _Route]] = []
        for layer, module in by_layer.items():
            config: PreTrainedConfig | None = own_config(module)
            if config is None:  # a module that looks up its attention has a config to look up the name in
                continue
            former = str(_implementation(config))
            if former not in IMPLEMENTATIONS:
                raise ValueError(
                    f"the model's attention implementation is {former!r}; "
                    "undo what set it, or call model.set_attn_implementation('sdpa'), then try again."
                )
            dense = _own_attention(module, former)
            if dense is None:
                continue
            routed = function[layer] if isinstance(function, Mapping) else function
            self._routes.append((weakref.ref(module), _Route(layer, routed, dense)))
            if not any(config is other for other, _ in self._configs):
                self._configs.append((config, former))
        if not self._routes:
            raise ValueError(
                f"{self._kind} does not take its attention function by name (AttentionInterface), so FASA "
                "cannot reach its queries and keys; use a family that does, such as Llama or Qwen."
            )
        self._close: weakref.finalize[Any, nn.Module] | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are routed."""
        return self._close is not None and self._close.alive

    def open(self) -> None:
        """Route the calls from now on.

        Raises:
            ValueError: the model is routed already.
        """
        modules = [module for module in (ref() for ref, _ in self._routes) if module is not None]
        with _lock:
            self._check_free(modules)
            _open[self._token] = (self._owner, frozenset(map(id, modules)))
            named = {id(config): _copy_named(config, former) for config, former in self._configs}
            for module, (_, route) in zip(modules, self._routes, strict=True):
                config = module.config
                setattr(module, _ROUTE, route)  # before the config is set: another thread may be in a forward
                setattr(module, OWN_CONFIG, config)
                module.config = named[id(config)]
        self._close = weakref.finalize(modules[0], _open.pop, self._token)

    def check(self) -> None:
        """Check that no other code has set another implementation, whose masks the routes do not read.

        Raises:
            ValueError: another implementation is set; the message names it.
        """
        if torch.compiler.is_compiling():
            return
        for config, former in self._configs:
            now = _implementation(config)
            if now != former:
                raise ValueError(
                    f"the attention implementation of {self._kind} was set to {now!r} after {self._owner} was opened, "
                    f"which attends by {former!r}; call disable() first, set it then, and enable again."
                )

    def close(self) -> None:
        """Give the modules their own configs back; a second call does nothing."""
        if self._close is not None and self._close.alive:
            self._close()
            for module in (ref() for ref, _ in self._routes):
                if module is not None:
                    module.config = own_config(module)
                    delattr(module, OWN_CONFIG)
                    delattr(module, _ROUTE)

    def __enter__(self) -> AttentionSeam:
        """Open the seam for calls of this thread alone, so that it does not measure generation in other threads."""
        self._routes = [
            (module, route._replace(function=_of_this_thread(route.function))) for module, route in self._routes
        ]
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_free(self, modules: list[nn.Module]) -> None:
        ids = set(map(id, modules))
        owner = next((owner for owner, routed in _open.values() if ids & routed), None)
        if owner is not None:
            raise ValueError(f"{self._kind} is under FASA already, by {owner}; disable() it first.")


def reading(model: PreTrainedModel, read: Callable[[AttentionCall], None]) -> AttentionSeam:
    """A seam, to be entered, that shows ``read`` every attention call of a model, which attends as before."""

    def attend(call: AttentionCall) -> AttentionResult:
        read(call)
        return call.run_dense()

    return AttentionSeam(model, attend)


def _of_this_thread(function: SeamFunction) -> SeamFunction:
    """Restrict a function to calls of this thread; calls of other threads run the model's own attention."""
    thread = threading.get_ident()
    return lambda call: function(call) if threading.get_ident() == thread else call.run_dense()


def implementation_of(model: PreTrainedModel, module: nn.Module) -> str:
    """Name of the attention implementation that an attention module uses without FASA, such as "sdpa"."""
    return str(_implementation(own_config(module) or model.config))


def _implementation(config: PreTrainedConfig) -> str | None:
    """Read the name in this config, without the config's own getter, which takes microseconds."""
    name: str | None = object.__getattribute__(config, "_attn_implementation_internal")
    return name


def _copy_named(config: PreTrainedConfig, former: str) -> PreTrainedConfig:
    """Copy a config with the seam's name over implementation ``former``, and register this name."""
    named = copy.copy(config)
    named._attn_implementation_internal = _OURS + former  # the public setter also changes all subconfigs
    AttentionInterface.register(_OURS + former, _router(former))
    return named


@functools.cache
def _router(former: str) -> Callable[..., AttentionResult]:
    """Return the function behind the seam's name: cached, since compiled graphs guard on its identity."""
    return functools.partial(_routed, former)


def _routed(
    former: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> AttentionResult:
    """Call a module's route, or its own attention if it has no route."""
    route: _Route | None = getattr(module, _ROUTE, None)
    if route is not None:
        return route.function(
            AttentionCall(route.layer, route.dense, module, query, key, value, attention_mask, kwargs)
        )
    dense = _own_attention(module, former)
    assert dense is not None  # its forward has just looked up the seam's name
    return dense(module, query, key, value, attention_mask, **kwargs)


def _own_attention(module: nn.Module, former: str) -> DenseAttention | None:
    """Return the attention function that a module's forward finds under ``former``; None if it looks up none."""
    lookup = attention_lookup(module)
    if lookup is None:
        return None
    interface, eager = lookup
    function: DenseAttention = interface.get_interface(former, eager)
    return function
