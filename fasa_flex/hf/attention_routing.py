"""The seam: route a model's attention calls through a function of ours, and back.

transformers looks the attention function up by the name in a config. A seam sets a name of ours in the configs that the
model's attention modules read, and a route on each of these modules: no class and no method is patched. A module
without a route, of another model that shares the config or was built from a copy of it, attends as it would have. A
config in which a submodel (a vision tower) has another implementation stays as it is.
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

    def __call__(  # noqa: D102 - the class says it
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> AttentionResult: ...


SeamFunction = Callable[..., AttentionResult]
"""What is routed through a seam: called as `DenseAttention` is, with the model's own attention as first argument."""

_tokens = itertools.count()
_lock = threading.RLock()
_open: dict[int, tuple[str, frozenset[int], list[PreTrainedConfig]]] = {}
"""Of every open seam: who opened it, the ids of its modules, and its configs."""


class AttentionSeam:
    """Route every attention call of a model's layers through a function, from `open` until `close`.

    Args:
        model: whose layers (`attention_modules`) are routed.
        function: what they are routed through; one for all layers, or each layer's by its number.
        owner: who opens it and how it is closed, for the error of whoever comes next.

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
            own = function[layer] if isinstance(function, Mapping) else function
            self._routes.append((weakref.ref(module), functools.partial(own, dense)))
            if not any(config is known for known in self._configs):
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
                setattr(module, _ROUTE, route)  # before any name leads here: another thread may be in a forward
            _open[self._token] = (self._owner, frozenset(map(id, modules)), self._configs)
            for config in self._configs:
                _set_implementation(config, _name_over(_former(config)))
        # a model that is dropped without being closed leaves a config behind, which others may share
        self._close = weakref.finalize(modules[0], _leave, self._token)

    def check(self) -> None:
        """Refuse to go on where somebody has set another implementation since, so that calls are not routed.

        Raises:
            ValueError: with what was set.
        """
        if torch.compiler.is_compiling():
            return
        for config in self._configs:
            now = _implementation(config)
            if not (now or "").startswith(_OURS):
                raise ValueError(
                    f"the attention implementation of {self._kind} was set to {now!r} past {self._owner}, so FASA is "
                    "asked no longer; call disable() first, set it then, and enable again."
                )

    def close(self) -> None:
        """Let the model attend as before; what somebody has set since stays set, and closing twice does nothing."""
        if self._close is not None and self._close.alive:
            self._close()
            for module in (ref() for ref, _ in self._routes):
                if module is not None:
                    delattr(module, _ROUTE)

    def __enter__(self) -> AttentionSeam:
        """Open it for the calls of this thread alone: another one may be generating, and is not to be measured."""
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
    """A route for the calls of one thread; those of others attend by the model's own function."""
    (dense,) = route.args

    def attend(dense: DenseAttention, module: nn.Module, *args: Any, **kwargs: Any) -> AttentionResult:
        return (route if threading.get_ident() == thread else dense)(module, *args, **kwargs)

    return functools.partial(attend, dense)


def implementation_of(model: PreTrainedModel, module: nn.Module) -> str:
    """The attention implementation that one of a model's layers has, or would have without FASA."""
    return _former(_config_of(model, module))


def _config_of(model: PreTrainedModel, module: nn.Module) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(module, "config", model.config)
    return config


def _former(config: PreTrainedConfig) -> str:
    return str(_implementation(config)).removeprefix(_OURS)


def _leave(token: int) -> None:
    """Give the configs of a seam their former name back, but those that another open seam routes too."""
    with _lock:
        _, _, configs = _open.pop(token)
        shared = {id(config) for _, _, others in _open.values() for config in others}
        for config in configs:
            if id(config) not in shared:
                _set_implementation(config, _former(config))


def _implementation(config: PreTrainedConfig) -> str | None:
    """The name in this config; past its own getter, which takes microseconds."""
    name: str | None = object.__getattribute__(config, "_attn_implementation_internal")
    return name


def _set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Set the name in this config alone; the public setters reach into all of its subconfigs."""
    config._attn_implementation_internal = name


def _name_over(former: str) -> str:
    """Our name for a model whose implementation is ``former``; it stays registered, as configs are copied."""
    name = _OURS + former
    AttentionInterface.register(name, _router(former))
    AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[former])
    return name


@functools.cache
def _router(former: str) -> Callable[..., AttentionResult]:
    """What our name stands for: one function, on whose identity compiled graphs are guarded."""
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
    """Attend by a module's route, or by its own attention."""
    attend: DenseAttention | None = getattr(module, _ROUTE, None)
    if attend is None:  # not `or`: torch 2.11's Dynamo does not know whether a partial function is true
        attend = _own_attention(module, former)
    assert attend is not None  # it has just looked our name up
    return attend(module, query, key, value, attention_mask, **kwargs)


def _own_attention(module: nn.Module, former: str) -> DenseAttention | None:
    """The function that ``former`` names where a module's forward looks it up; None where it looks nothing up."""
    lookup = attention_lookup(module)
    if lookup is None:
        return None
    interface, eager = lookup
    own: DenseAttention = interface.get_interface(former, eager)
    return own
