"""The attention seam: routes a model's attention calls through another function, and back.

transformers looks up the attention function by a name in the config. The seam sets its own name in the configs that the
model's attention modules read, and stores a route on each of these modules; it patches no class or method. A module
without a route, in another model that shares the config or was built from a copy of it, runs its own attention. The
seam does not change configs of submodels with another implementation (a vision tower).
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from fasa_flex.hf.compatibility import IMPLEMENTATIONS
from fasa_flex.hf.model_structure import attention_lookup, attention_modules, layer_of

_OURS = "fasa_"
_ROUTE = "_fasa_route"

AttentionResult = tuple[Tensor, Tensor | None]


class DenseAttention(Protocol):
    """The model's own attention: q [B, Hq, Q, D], k and v [B, Hkv, T, D] -> ([B, Q, Hq, D], weights or None)."""

    def __call__(  # noqa: D102 - see the class
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> AttentionResult: ...


SeamFunction = Callable[..., AttentionResult]
"""A function that a seam routes calls through: arguments of `DenseAttention` after the model's own attention."""

_tokens = itertools.count()
_lock = threading.RLock()
_open: dict[int, tuple[str, frozenset[int], list[PreTrainedConfig]]] = {}
"""Owner, module ids and configs of every open seam, by its token."""


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
        self._configs: list[PreTrainedConfig] = []
        self._routes: list[tuple[weakref.ref[nn.Module], functools.partial[AttentionResult]]] = []
        for layer, module in by_layer.items():
            config = _config_of(model, module)
            former = _former(config)
            if former not in IMPLEMENTATIONS:
                raise ValueError(
                    f"the model's attention implementation is {former!r}; "
                    "undo what set it, or call model.set_attn_implementation('sdpa'), then try again."
                )
            dense = _own_attention(module, former)
            if dense is None:
                continue
            routed = function[layer] if isinstance(function, Mapping) else function
            self._routes.append((weakref.ref(module), functools.partial(routed, dense)))
            if not any(config is other for other in self._configs):
                self._configs.append(config)
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
            for module, (_, route) in zip(modules, self._routes, strict=True):
                setattr(module, _ROUTE, route)  # before the name is set: another thread may be in a forward
            _open[self._token] = (self._owner, frozenset(map(id, modules)), self._configs)
            for config in self._configs:
                _set_implementation(config, _name_over(_former(config)))
        # if the model is deleted while the seam is open, other models may still share its config
        self._close = weakref.finalize(modules[0], _leave, self._token)

    def check(self) -> None:
        """Check that no other code has set another implementation, which would bypass the routes.

        Raises:
            ValueError: another implementation is set; the message names it.
        """
        if torch.compiler.is_compiling():
            return
        for config in self._configs:
            now = _implementation(config)
            if not (now or "").startswith(_OURS):
                raise ValueError(
                    f"the attention implementation of {self._kind} was set to {now!r} after {self._owner} was opened, "
                    "so that its calls bypass FASA; call disable() first, set it then, and enable again."
                )

    def close(self) -> None:
        """Restore the model's own attention, except where other code has set another; a second call does nothing."""
        if self._close is not None and self._close.alive:
            self._close()
            for module in (ref() for ref, _ in self._routes):
                if module is not None:
                    delattr(module, _ROUTE)

    def __enter__(self) -> AttentionSeam:
        """Open the seam for calls of this thread alone, so that it does not measure generation in other threads."""
        thread = threading.get_ident()
        self._routes = [(module, _of_thread(thread, route)) for module, route in self._routes]
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_free(self, modules: list[nn.Module]) -> None:
        ids = set(map(id, modules))
        owner = next((owner for owner, routed, _ in _open.values() if ids & routed), None)
        if owner is not None:
            raise ValueError(f"{self._kind} is under FASA already, by {owner}; disable() it first.")


def reading(model: PreTrainedModel, read: Callable[[int, Tensor, Tensor, dict[str, Any]], None]) -> AttentionSeam:
    """A seam, to be entered, that shows ``read`` every layer's queries and keys; the model attends as before.

    Args:
        model: whose layers are read.
        read: called with the layer's number, query float [B, Hq, Q, D], key float [B, Hkv, T, D], and the keyword
            arguments of the attention function.
    """

    def attend(
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> AttentionResult:
        read(layer_of(module), query, key, options)
        return dense(module, query, key, value, attention_mask, **options)

    return AttentionSeam(model, attend)


def _of_thread(thread: int, route: functools.partial[AttentionResult]) -> functools.partial[AttentionResult]:
    """Make a route for the calls of one thread; calls of other threads run the model's own attention."""
    (dense,) = route.args

    def attend(dense: DenseAttention, module: nn.Module, *args: Any, **kwargs: Any) -> AttentionResult:
        return (route if threading.get_ident() == thread else dense)(module, *args, **kwargs)

    return functools.partial(attend, dense)


def implementation_of(model: PreTrainedModel, module: nn.Module) -> str:
    """Name of the attention implementation that a layer's module uses without FASA, such as "sdpa"."""
    return _former(_config_of(model, module))


def _config_of(model: PreTrainedModel, module: nn.Module) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(module, "config", model.config)
    return config


def _former(config: PreTrainedConfig) -> str:
    return str(_implementation(config)).removeprefix(_OURS)


def _leave(token: int) -> None:
    """Restore the former name in the configs of a seam, except in those that another open seam uses."""
    with _lock:
        _, _, configs = _open.pop(token)
        shared = {id(config) for _, _, others in _open.values() for config in others}
        for config in configs:
            if id(config) not in shared:
                _set_implementation(config, _former(config))


def _implementation(config: PreTrainedConfig) -> str | None:
    """Read the name in this config, without the config's own getter, which takes microseconds."""
    name: str | None = object.__getattribute__(config, "_attn_implementation_internal")
    return name


def _set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Set the name in this config alone; the public setters also change all of its subconfigs."""
    config._attn_implementation_internal = name


def _name_over(former: str) -> str:
    """Register and return the seam's name for implementation ``former``; it stays registered for copied configs."""
    name = _OURS + former
    AttentionInterface.register(name, _router(former))
    AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[former])
    return name


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
    attend: DenseAttention | None = getattr(module, _ROUTE, None)
    if attend is None:  # not `or`: torch 2.11's Dynamo cannot evaluate the truth of a partial
        attend = _own_attention(module, former)
    assert attend is not None  # its forward has just looked up the seam's name
    return attend(module, query, key, value, attention_mask, **kwargs)


def _own_attention(module: nn.Module, former: str) -> DenseAttention | None:
    """Return the attention function that a module's forward finds under ``former``; None if it looks up none."""
    lookup = attention_lookup(module)
    if lookup is None:
        return None
    interface, eager = lookup
    function: DenseAttention = interface.get_interface(former, eager)
    return function
