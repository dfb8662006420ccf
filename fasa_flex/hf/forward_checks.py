"""What a model hands to its attention function: its softmax, and keys and lengths that cannot end well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.masks import check_mask, valid_from_mask


def scaling_of(query: Tensor, options: dict[str, Any]) -> float:
    """The factor of a model's dot products, from the keyword arguments of its attention function."""
    return options.get("scaling") or float(query.shape[-1] ** -0.5)


def softmax_of(module: nn.Module, query: Tensor, options: dict[str, Any], implementation: str) -> Softmax:
    """The model's own softmax, from the keyword arguments of its attention function.

    Raises:
        ValueError: the model's ``implementation`` leaves a part of it out.
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
    """The mask of several queries where the model hands on none: None is causal, else all keys, of a decoder that is
    used bidirectionally.

    sdpa makes no mask causal unless it is told otherwise, eager attention adds none and so sees every key.

    Args:
        module: the attention module.
        options: keyword arguments of the attention function.
        implementation: the model's.
        shape: queries and keys, Q and T.
        device: of the mask.
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
    """Refuse a forward that cannot end well; asked before a cache is written to.

    A prompt may not be longer than the model was made for; a token decoded beyond that is the model's own affair.

    Args:
        batch: rows.
        q_len: tokens that each adds.
        cache: to be written to; None: the forward has none.
        layer: the first that is written to.
        options: keyword arguments of the attention module.
        boundary: of `Fasa.sparse_from`.
        limit: the longest sequence that the model takes; None: it states none.

    Raises:
        ValueError: a boundary for other rows, an attention mask that is more than a mask or of other queries and keys
            than the forward's, or too long a sequence.
    """
    if boundary is not None:
        boundary.check_rows(batch)
    mask: Tensor | None = options.get("attention_mask")
    if mask is not None:
        check_mask(mask, (batch, q_len, q_len if cache is None else cache.get_mask_sizes(q_len, layer)[0]))
    if limit is None or q_len == 1 or torch.compiler.is_compiling():
        return
    end = q_len if cache is None else int(cache.get_seq_length(layer)) + q_len
    if end <= limit:
        return
    positions: Tensor | None = options.get("position_ids")  # which do not count padding
    longest = end if positions is None else int(positions.max()) + 1
    if longest > limit:
        raise ValueError(f"the sequence has {longest} tokens and the model takes at most {limit}; shorten the prompt.")


def check_keys(
    layer: int, key: Tensor, q_len: int, mask: Tensor | None, spoilt: Tensor | None, begins: bool
) -> Tensor | None:
    """Refuse NaN in a forward of several tokens, but in padding.

    In decode a check would stall the device; NaN keys rank first there and show.

    Dense attention adds a mask to logits, so NaN in the padding of a row spoils all that follows in this row, and no
    other. That is let be: neither the model's weights nor its dtype are to blame.

    Args:
        layer: its number.
        key: float [B, Hkv, T, D].
        q_len: queries, Q.
        mask: of the forward, as for `valid_from_mask`.
        spoilt: bool [B], what this returned for the forward's first layer; None before it.
        begins: whether this is the first.

    Returns:
        bool [B], the rows whose padding holds NaN; None: none does.

    Raises:
        ValueError: other NaN in the keys.
    """
    if not key.isnan().any():
        return spoilt
    found = key.isnan().any(-1).any(1)
    if begins:
        attended = valid_from_mask(mask, (key.shape[0], q_len, key.shape[2]), key.device)[:, 0, 0].any(1)
        spoilt = (found & ~attended).any(1)
        found = found & attended
    elif spoilt is not None:
        found = found & ~spoilt.to(found.device)[:, None]
    if found.any():
        raise ValueError(f"the keys of layer {layer} hold NaN; check the model's weights, its dtype and its inputs.")
    return spoilt
