"""Structure of a model: its attention modules, their shape, and the layers that FASA leaves dense."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from fasa_flex.hf.layer_kinds import WINDOW, other_kinds, sized_config, why_unsupported

_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
OWN_CONFIG = "_fasa_own_config"
"""Attribute of an attention module that holds its own config while a seam has replaced it by a copy."""
NOT_MEASURED = "no measurement in the profile; calibrate again if FASA can serve it"


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find the attention module of every layer of the text decoder, by layer number.

    These modules have a ``layer_idx``, look up their attention function by name (convolutions and recurrent layers do
    not) and have the text config (towers, codecs and depth decoders do not). If no module meets all conditions, the
    result holds every module with a ``layer_idx``, so that errors can name them. A module whose ``layer_idx`` is no
    number has that of its decoder layer.
    """
    text = model.config.get_text_config()
    having = _having_layer_idx(model.get_decoder() or model) or _having_layer_idx(model)
    found = [module for module in having if attention_lookup(module) is not None] or having
    found = [module for module in found if _INTERFACE in _forward(module).__code__.co_names] or found
    found = [module for module in found if own_config(module) is text] or found
    own = set(found)
    inner = [module for module in found if not any(child is not module and child in own for child in module.modules())]
    modules: dict[int, nn.Module] = {}
    for module, number in zip(inner, _numbers(model, inner), strict=True):  # self-attention before cross-attention
        modules.setdefault(number, module)
    return modules


def _having_layer_idx(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "layer_idx")]


def _numbers(model: PreTrainedModel, modules: list[nn.Module]) -> list[int]:
    """Number of each module's layer: its ``layer_idx``, or its place in the decoder (Zamba's None, Zamba 2's -1)."""
    stated: list[Any] = [module.layer_idx for module in modules]
    if all(isinstance(number, int) and number >= 0 for number in stated):
        return stated
    layers = [each for single in decoder_layers(model, modules) for each in enumerate(single)]
    places = {inner: place for place, layer in layers for inner in layer.modules()}
    return [places.get(module, -1) for module in modules]


def decoder_layers(model: PreTrainedModel, attention: Iterable[nn.Module]) -> list[nn.ModuleList]:
    """The decoder's lists of layers, recurrent ones included: the outermost lists that hold ``attention`` modules."""
    sought, inside = set(attention), set[nn.Module]()
    found: list[nn.ModuleList] = []
    for module in (model.get_decoder() or model).modules():
        if isinstance(module, nn.ModuleList) and module not in inside and not sought.isdisjoint(module.modules()):
            found.append(module)
            inside.update(module.modules())
    return found


def own_config(module: nn.Module) -> Any:
    """Return the config that an attention module has without a seam; None if it has none."""
    return getattr(module, OWN_CONFIG, None) or getattr(module, "config", None)


def attention_lookup(module: nn.Module) -> tuple[AttentionInterface, Callable[..., Any]] | None:
    """Find the registry in which a module's forward looks up its attention function, and its "eager" function.

    Both are read from the globals of the class that defines the forward. None: the forward looks up no function.
    """
    for kind in type(module).__mro__:
        forward = inspect.unwrap(vars(kind).get("forward", _nothing))
        if not inspect.isfunction(forward):
            continue
        names = forward.__globals__
        eager = next((name for name in forward.__code__.co_names if name.endswith(_EAGER)), _EAGER)
        if _INTERFACE in names and eager in names:
            return names[_INTERFACE], names[eager]
    return None


def _forward(module: nn.Module) -> Callable[..., Any]:
    """The Python function behind a module's forward."""
    forward = inspect.unwrap(type(module).forward)
    return forward if inspect.isfunction(forward) else _nothing


def _nothing() -> None:
    """Stand in for the forward of a class that defines none."""


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Read numbers of layers, query heads, key/value heads, and dimensions of a query or key head from the config.

    If the config states sizes by layer, those of the first layer with a growing cache of keys count.
    """
    layers = model.config.get_text_config().num_hidden_layers
    config = sized_config(model.config)
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    if getattr(config, "kv_lora_rank", None):  # MLA: after expansion of the latents
        kv_heads, head_dim = query_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    return layers, query_heads, kv_heads, head_dim


def device_of(module: nn.Module, model: nn.Module | None = None) -> torch.device:
    """Device on which a module computes: accelerate's execution device, or that of its parameters and buffers.

    Args:
        module: a model or a part of one.
        model: the model that contains ``module``; its device counts if the module has no tensors of its own.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    devices = [tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())]
    real = next((device for device in devices if device.type != "meta"), None)
    if real is not None:
        return real
    if model is not None:
        return device_of(model)
    return next(iter(devices), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode; afterwards every module gets its former mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def maximum_positions(model: PreTrainedModel) -> int | None:
    """Maximum sequence length that the model's config allows, in tokens; None: it states none.

    Scaled RoPE (YaRN, linear) allows the original length times its factor, whether or not the config states the
    product; dynamic RoPE has no limit.
    """
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)  # Whisper's
    if not isinstance(limit, int) or limit < 1:  # XLNet's -1
        return None
    stated = getattr(text, "rope_parameters", None) or {}
    longest = limit
    for rope in [stated, *(value for value in stated.values() if isinstance(value, dict))]:
        if rope.get("rope_type") == "dynamic":
            return None
        trained = rope.get("original_max_position_embeddings") or limit
        longest = max(longest, int(trained * (rope.get("factor") or 1.0)))
    return longest


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model that FASA cannot serve.

    Raises:
        ValueError: the model is not supported; the message gives the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained.")
    reason = why_unsupported(model.config)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} {reason}; FASA needs a decoder-only RoPE model, such as Llama.")


def dense_layers(
    model: PreTrainedModel, chosen: tuple[int, ...], unserved: tuple[int, ...], seen: Mapping[int, str] | None = None
) -> dict[int, str]:
    """Collect the layers that stay dense, each with the reason.

    Args:
        model: the model.
        chosen: ``FasaConfig.dense_layers``.
        unserved: ``RotaryLayout.unserved_layers``.
        seen: layers and reasons found in a probing forward (`fasa_flex.hf.probe.why_dense`).

    Raises:
        ValueError: ``chosen`` names a layer that the model does not have.
    """
    layers = attention_shape(model)[0]
    if chosen and max(chosen) >= layers:
        raise ValueError(f"dense_layers names layer {max(chosen)}, the model has {layers}; count from 0.")
    others = other_kinds(model.config)
    windows = {layer: reason for layer, reason in others.items() if reason == WINDOW}
    reasons = {**dict.fromkeys(unserved, NOT_MEASURED), **others, **(seen or {}), **windows}
    return dict(sorted({**reasons, **dict.fromkeys(chosen, "asked for by dense_layers")}.items()))
