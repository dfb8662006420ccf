"""Softmax settings of an attention call, and checks that refuse bad masks, NaN keys and sequences that are too long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.masks import check_mask, valid_from_mask


def scaling_of(query: Tensor, options: dict[str, Any]) -> float:
    """Factor that the model multiplies dot products by, from the keyword arguments of its attention function."""
    return options.get("scaling") or float(query.shape[-1] ** -0.5)


def softmax_of(module: nn.Module, query: Tensor, options: dict[str, Any], implementation: str) -> Softmax:
    """Read the model's softmax from the keyword arguments of its attention function.

    Raises:
        ValueError: the model's ``implementation`` ignores its logit cap or its learned sinks.
    """
    scaling, softcap, sinks = options.get("scaling"), options.get("softcap"), options.get("s_aux")
    if implementation == "sdpa" and (softcap is not None or sinks is not None):
        raise ValueError(
            f"{type(module).__name__} caps its logits or has learned sinks, which its implementation 'sdpa' leaves "
            "out; call model.set_attn_implementation('eager') before enable."
        )
    return Softmax(scaling or float(query.shape[-1] ** -0.5), softcap, sinks)


def mask_of(
    module: nn.Module, options: dict[str, Any], implementation: str, shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Return the mask that several queries have if the model passes none: None if causal, otherwise all keys.

    Without a mask, sdpa is causal unless ``is_causal`` is False, and eager attention sees every key, as in a decoder
    that is used bidirectionally.

    Args:
        module: the attention module.
        options: keyword arguments of the attention function.
        implementation: name of the model's own attention, such as "sdpa".
        shape: Q and T.
        device: device of the mask.
    """
    stated = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if stated is None else stated
    if causal and implementation == "sdpa":
        return None
    return torch.ones(1, 1, *shape, dtype=torch.bool, device=device)


def check_forward(
    batch: int,
    q_len: int,
    cache: Cache | None,
    layer: int,
    options: dict[str, Any],
    boundary: Boundary | None,
    limit: int | None,
) -> None:
    """Check the arguments of a forward before it writes to a cache.

    A prompt may not exceed the model's maximum length; decoding single tokens beyond it is allowed.

    Args:
        batch: B, batch rows.
        q_len: Q, tokens that each row adds.
        cache: cache that the forward writes to; None: the forward has none.
        layer: number of the first layer that is written.
        options: keyword arguments of the attention module.
        boundary: boundary set by `Fasa.sparse_from`.
        limit: maximum sequence length of the model in tokens; None: the model states none.

    Raises:
        ValueError: the boundary is for another batch size, the attention mask adds a bias or has another shape than the
            forward, or the sequence is too long.
    """
    if boundary is not None:
        boundary.check_rows(batch)
    mask = options.get("attention_mask")
    if isinstance(mask, Tensor):  # Zaya's modules take a table of masks; attention receives one of them
        check_mask(mask, (batch, q_len, q_len if cache is None else cache.get_mask_sizes(q_len, layer)[0]))
    if limit is None or q_len == 1 or torch.compiler.is_compiling():
        return
    end = q_len if cache is None else int(cache.get_seq_length(layer)) + q_len
    if end <= limit:
        return
    positions: Tensor | None = options.get("position_ids")  # padding does not count
    longest = end if positions is None else int(positions.max()) + 1
    if longest > limit:
        raise ValueError(f"the sequence has {longest} tokens and the model takes at most {limit}; shorten the prompt.")


def check_keys(
    layer: int, key: Tensor, q_len: int, mask: Tensor | None, nan_rows: Tensor | None, begins: bool
) -> Tensor | None:
    """Refuse NaN keys in a forward of several tokens, except in padding.

    Decode steps are not checked, which would stall the device; there NaN keys rank first and show in the result.

    Dense attention adds the mask to the logits, so that NaN in the padding of a batch row makes all later states of
    this row NaN. This is allowed, since neither the model's weights nor its dtype are the cause.

    Args:
        layer: number of the layer, for the error.
        key: float [B, Hkv, T, D].
        q_len: Q.
        mask: mask of the attention call, as in `valid_from_mask`.
        nan_rows: bool [B], result of this function for the forward's first layer; None in the first layer.
        begins: whether ``layer`` is the first layer.

    Returns:
        bool [B], the batch rows whose padding holds NaN; None: no row.

    Raises:
        ValueError: keys outside the padding hold NaN.
    """
    if not key.isnan().any():
        return nan_rows
    is_nan = key.isnan().any(-1).any(1)
    if begins:
        attended = valid_from_mask(mask, (key.shape[0], q_len, key.shape[2]), key.device)[:, 0, 0].any(1)
        nan_rows = (is_nan & ~attended).any(1)
        is_nan = is_nan & attended
    elif nan_rows is not None:
        is_nan = is_nan & ~nan_rows.to(is_nan.device)[:, None]
    if is_nan.any():
        raise ValueError(f"the keys of layer {layer} hold NaN; check the model's weights, its dtype and its inputs.")
    return nan_rows
