"""What a model is made of: its attention modules, their shape, and the layers that FASA leaves dense."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
NO_ROPE = "no RoPE, hence no frequency chunks"
_SELECTABLE = ("full_attention", "sliding_attention", "chunked_attention")


def layer_of(module: nn.Module) -> int:
    """The number that transformers gives an attention module; counts from 0."""
    layer = module.layer_idx
    assert isinstance(layer, int), f"{type(module).__name__} does not say which layer it is"
    return layer


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of every layer of the text decoder.

    They know their ``layer_idx``, look their attention function up by name, which convolutions and recurrent layers do
    not, and have the config of the text, which towers, codecs and depth decoders have not. Where none does, all that
    are numbered, for the error to name.
    """
    text = model.config.get_text_config()
    numbered = _numbered(model.get_decoder() or model) or _numbered(model)
    found = [module for module in numbered if attention_lookup(module) is not None] or numbered
    found = [module for module in found if getattr(module, "config", None) is text] or found
    inner = [m for m in found if not any(child is not m and hasattr(child, "layer_idx") for child in m.modules())]
    modules: dict[int, nn.Module] = {}
    for module in inner:  # a layer's attention to its own text comes before that to an encoder's output
        modules.setdefault(layer_of(module), module)
    return modules


def _numbered(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def attention_lookup(module: nn.Module) -> tuple[AttentionInterface, Callable[..., Any]] | None:
    """Where a module's forward looks its attention function up, and what it takes for "eager"; None: it does not.

    A class of a user's own has what the class has that it inherits the forward from.
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


def _nothing() -> None:
    """The forward of a class that has none of its own."""


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(layers, query heads, key/value heads, dimensions of a query and key head) as the model's config states them."""
    config = model.config.get_text_config()
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    if getattr(config, "kv_lora_rank", None):  # MLA: queries and keys as attention sees them, expanded and whole
        kv_heads, head_dim = query_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    return config.num_hidden_layers, query_heads, kv_heads, head_dim


def device_of(module: nn.Module, model: nn.Module | None = None) -> torch.device:
    """Where a module computes: where accelerate brings its weights for that, or where they are, parameters or buffers.

    Args:
        module: a model or a part of one.
        model: of which it is a part, and whose device it has if it holds nothing itself.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    devices = [tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())]
    there = next((device for device in devices if device.type != "meta"), None)
    if there is not None:
        return there
    if model is not None:
        return device_of(model)
    return next(iter(devices), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation, and every module of it back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def maximum_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model's config allows, or None where it states none.

    RoPE that is stretched (YaRN, linear) allows its factor more than what it was trained at, whether the config says so
    or not, and dynamic RoPE stretches as it goes.
    """
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)  # Whisper's
    if not isinstance(limit, int):
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
        ValueError: one sentence with the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained.")
    reason = _why_unsupported(model.config)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} {reason}; FASA needs a decoder-only RoPE model, such as Llama.")


def _why_unsupported(config: Any) -> str | None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "is an encoder-decoder, of whose two kinds of attention FASA serves none"
    if text.model_type == "bloom" or getattr(getattr(text, "attn_config", text), "alibi", False):
        return "adds ALiBi to its logits and rotates no queries and keys (no RoPE), so it has no frequency chunks"
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(_SELECTABLE))
    if "indexed_attention" in others:
        return "has layers of type indexed_attention, which select their keys by an indexer of their own"
    if others:
        return f"has layers of type {', '.join(others)}, which keep no keys and values to select from"
    if getattr(text, "num_attention_heads", None) is None:
        return "has no attention heads (a recurrent model), so it has no queries and keys to compare"
    sizes = {_head_size(layer) for layer in getattr(text, "per_layer_config", None) or ()}
    if len(sizes) > 1:
        return f"has heads of different sizes in its layers ({', '.join(map(str, sorted(sizes, key=str)))})"
    return None


def _head_size(config: Any) -> tuple[Any, ...]:
    return tuple(getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))


def dense_layers(
    model: PreTrainedModel, asked: tuple[int, ...], unrotated: tuple[int, ...], seen: Mapping[int, str] | None = None
) -> dict[int, str]:
    """The layers that stay dense, each with its reason.

    Args:
        model: whose layers they are.
        asked: ``FasaConfig.dense_layers``.
        unrotated: ``RotaryLayout.unrotated_layers``.
        seen: reasons that a probing forward shows (`fasa_flex.hf.probe.why_dense`).

    Raises:
        ValueError: layers that the model does not have.
    """
    layers = attention_shape(model)[0]
    if asked and max(asked) >= layers:
        raise ValueError(f"dense_layers names layer {max(asked)}, the model has {layers}; count from 0.")
    reasons = {**dict.fromkeys(unrotated, NO_ROPE), **(seen or {})}
    for layer, cache in enumerate(DynamicCache(config=model.config).layers):
        if getattr(cache, "is_sliding", False):
            reasons[layer] = "sliding window, which bounds its keys already"
    return dict(sorted({**reasons, **dict.fromkeys(asked, "asked for by dense_layers")}.items()))
