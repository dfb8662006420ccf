"""Names in transformers and lm-eval that fasa_flex relies on, and checks that the installed releases have them.

`check_transformers` checks registries and cache methods of transformers, `check_arrivals` the arguments that attention
receives in a probing forward (`fasa_flex.hf.probe`); `enable` and `RotaryLayout.detect` call both. `check_lm_eval`
checks the methods of lm-eval that ``fasa_hf`` overrides, when a ``fasa_hf`` model is made. Names that are imported need
no check, since their import fails.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from fasa_flex.hf.arrival import Arrival
from fasa_flex.hf.wrappers import unwrapped

TESTED = {"transformers": ("5.17", "5.24"), "lm_eval": ("0.4.10", "0.4.13")}
"""Oldest and newest release with which all tests have passed; pyproject.toml allows this range."""

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Argument names of an attention module's cache: since transformers 5.24, before 5.24, and in GPT-NeoX."""

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that a model may have; their masks are registered under these names."""

CACHE_METHODS: dict[type, tuple[str, ...]] = {
    Cache: ("get_seq_length", "get_mask_sizes", "update", "reset", "crop", "reorder_cache"),
    DynamicLayer: (
        *("get_seq_length", "lazy_initialization", "update", "reset", "crop", "reorder_cache", "offload", "prefetch"),
        *("batch_repeat_interleave", "batch_select_indices"),
    ),
    StaticLayer: (
        *("get_seq_length", "lazy_initialization", "update", "reset", "reorder_cache", "offload", "prefetch"),
    ),
}
"""Methods that our caches call or override."""

LM_EVAL_HOOKS: dict[str, tuple[str, ...]] = {
    "loglikelihood": ("requests", "disable_tqdm"),
    "generate_until": ("requests", "disable_tqdm"),
    "loglikelihood_rolling": ("requests", "disable_tqdm"),
    "_loglikelihood_tokens": ("requests", "disable_tqdm", "override_bs"),
    "_model_generate": ("context", "max_length", "stop"),
    "tok_batch_encode": ("strings", "padding_side", "left_truncate_len", "truncation"),
    "set_cache_hook": ("cache_hook",),
    "get_model_info": (),
}
"""Methods of lm-eval's ``hf`` that ``fasa_hf`` overrides, with the argument names that it uses."""

GATHER = {"gather_object": ("obj", "dst")}
"""Methods that ``fasa_hf`` overrides in runs of several processes, which lm-eval supports since 0.4.12."""


def unmet(package: str, what: str, since: str | None = None) -> ValueError:
    """Make the error for an installed ``package`` that does ``what``; ``since``: oldest release to recommend."""
    oldest, newest = TESTED[package]
    oldest = since or oldest
    families = " and families such as Llama and Qwen" if package == "transformers" else ""
    return ValueError(
        f"{package} {metadata.version(package)} {what}; fasa_flex is tested with {package} {oldest} to {newest}"
        f"{families}, use one of these."
    )


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return ``cache`` as a keyword argument for the model's forward and `generate`.

    Its name is ``cache`` since transformers 5.24 and ``past_key_values`` before; later releases warn of the old name.
    """
    names = inspect.signature(unwrapped(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def check_transformers(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> None:
    """Check the registered names and cache methods of transformers, and that attention modules have a layer number.

    Args:
        model: the model.
        modules: result of `attention_modules` for this model.

    Raises:
        ValueError: a name is missing.
    """
    for registry, names in ((AttentionInterface, ("sdpa",)), (AttentionMaskInterface, IMPLEMENTATIONS)):
        registered = getattr(registry, "_global_mapping", {})
        missing = [name for name in names if name not in registered]
        if missing or not callable(getattr(registry, "register", None)):
            raise unmet("transformers", f"has no {registry.__name__}.register with {' and '.join(names)} registered")
    for kind, methods in CACHE_METHODS.items():
        for method in methods:
            if not callable(getattr(kind, method, None)):
                raise unmet("transformers", f"has no method {method} in {kind.__name__}")
    if not modules or min(modules) < 0:  # -1: neither a layer_idx nor a place in the decoder
        raise unmet("transformers", f"gives the attention modules of {type(model).__name__} no layer_idx of their own")


def check_arrivals(model: PreTrainedModel, cache: DynamicCache, arrivals: Mapping[int, Arrival]) -> None:
    """Check the arguments that a model's attention received in a probing forward of a row with padding.

    Args:
        model: the model.
        cache: the growing cache of that forward; this function crops its last token.
        arrivals: arguments of the attention, by layer number.

    Raises:
        ValueError: an argument is missing or is not as expected.
    """
    of = f"the attention modules of {type(model).__name__}"
    if not arrivals:
        raise unmet("transformers", f"calls the attention function of its registry for none of {of}")
    for layer, arrived in arrivals.items():
        unexpected = _unexpected(arrived)
        if unexpected is not None:
            raise unmet("transformers", f"hands {of} {unexpected} (layer {layer})")
    if not any(arrived.cache is cache for arrived in arrivals.values()):
        names = ", ".join(f"{name}=" for name in CACHE_NAMES)
        raise unmet("transformers", f"hands {of} no cache under a known name ({names})")
    if not any(arrived.mask is not None for arrived in arrivals.values()):
        raise unmet("transformers", f"hands {of} no attention mask for a row with padding")
    layers: list[Any] = cache.layers
    for layer, arrived in arrivals.items():
        if arrived.cache is cache and layer < len(layers) and type(layers[layer]) is DynamicLayer:
            _check_length(layers[layer], arrived.query.shape[2])


def _unexpected(arrived: Arrival) -> str | None:
    """Describe the first argument of a layer that is not as expected; None: all are."""
    mask, options, module = arrived.mask, arrived.options, arrived.module
    if not arrived.has_states:
        return "no hidden_states, by this name or as first argument"
    if mask is not None and not _is_mask(mask, arrived):
        return (
            f"an attention mask of shape {tuple(mask.shape)} and {mask.dtype}, where a bool or float one of shape "
            "[batch, 1, queries, keys] is expected"
        )
    if mask is not None and "attention_mask" not in arrived.arguments:
        return "its mask under another name than attention_mask="
    if options.get("position_bias") is not None:
        return "a position_bias, which FASA does not add to its logits"
    config: Any = getattr(module, "config", None)
    if getattr(config, "attn_logit_softcapping", None) is not None and options.get("softcap") is None:
        return "no softcap=, which the model's config states"
    if getattr(module, "sinks", None) is not None and options.get("s_aux") is None:
        return "no s_aux=, the learned sinks that it has"
    scaling, plain = getattr(module, "scaling", None), arrived.query.shape[-1] ** -0.5
    if isinstance(scaling, float) and scaling != plain and options.get("scaling") is None:
        return "no scaling=, which the module has"
    return None


def _is_mask(mask: Tensor, arrived: Arrival) -> bool:
    rows, _, queries, _ = arrived.query.shape
    kinds = mask.dtype.is_floating_point or str(mask.dtype) == "torch.bool"
    return kinds and mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[1:3] == (1, queries)


def _check_length(layer: DynamicLayer, tokens: int) -> None:
    """Check that a cache layer holds the ``tokens`` of the forward, and that ``crop(-1)`` drops the last."""
    count = int(layer.get_seq_length())
    if count != tokens:
        raise unmet("transformers", f"counts {count} tokens in a cache layer that was given {tokens}")
    layer.crop(-1)
    left = int(layer.get_seq_length())
    if left != tokens - 1:
        raise unmet("transformers", f"leaves {left} of {tokens} tokens in a cache layer after crop(-1)")


def check_lm_eval(model_class: type) -> None:
    """Check that lm-eval has the methods that ``fasa_hf`` overrides: a hook that is never called raises no error.

    Args:
        model_class: lm-eval's ``HFLM``.

    Raises:
        ValueError: a method is missing, or takes other arguments.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun and accelerate set it
    for name, arguments in {**LM_EVAL_HOOKS, **(GATHER if several else {})}.items():
        since = "0.4.12" if name in GATHER else None
        method = getattr(model_class, name, None)
        if not callable(method):
            raise unmet("lm_eval", f"has no method {name} in {model_class.__name__}, which fasa_hf overrides", since)
        parameters = inspect.signature(method).parameters
        missing = [argument for argument in arguments if argument not in parameters]
        if missing:
            raise unmet("lm_eval", f"has no argument {' and '.join(missing)} in {model_class.__name__}.{name}", since)
