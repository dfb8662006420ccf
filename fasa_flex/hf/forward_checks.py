"""Checks of a forward, which refuse bad masks, NaN keys and sequences that are too long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.masks import check_mask, valid_from_mask


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
