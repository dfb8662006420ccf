"""Valid keys of queries, read from the masks that transformers passes to attention functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.core.selection import running_count

Shape = tuple[int, int, int]
"""Batch, queries, keys: B, Q, T."""

MASKED = -1e3
"""Largest value of an additive mask that excludes a key: after adding it the key has no weight."""


def valid_from_mask(attention_mask: Tensor | None, shape: Shape, device: torch.device) -> Tensor:
    """Read the keys that each query may attend to from the mask of an attention call.

    Args:
        attention_mask: bool (True: attend) or additive float, [B or 1, 1, Q, T]; None: all keys for one query,
            otherwise upper-left causal (a first prefill, whatever the length of the buffer).
        shape: B, Q and T.
        device: device of the result if there is no mask.

    Returns:
        bool [B or 1, 1, 1, Q, T].

    Raises:
        ValueError: the mask has another shape.
    """
    _, q_len, kv_len = shape
    if attention_mask is None:
        slots = torch.arange(kv_len, device=device)
        last = slots[:q_len, None] if q_len > 1 else slots[-1:, None]
        return (slots <= last)[None, None, None]
    _check_shape(attention_mask, shape)
    mask = attention_mask[..., :kv_len]
    if mask.dtype is not torch.bool:
        mask = mask > MASKED
    return mask[:, :, None]


def last_valid(attention_mask: Tensor | None, shape: Shape, device: torch.device) -> Tensor:
    """Read the keys that a forward's last query may attend to: bool [B or 1, T]."""
    batch, q_len, kv_len = shape
    if attention_mask is None:
        return (torch.arange(kv_len, device=device) < (q_len if q_len > 1 else kv_len))[None]
    return valid_from_mask(attention_mask[:, :, -1:], (batch, 1, kv_len), device)[:, 0, 0, 0]


def valid_numbers(attention_mask: Tensor | None, shape: Shape, device: torch.device) -> Tensor:
    """Count the keys of `last_valid` up to and including each slot: int64 [B or 1, T]."""
    return running_count(last_valid(attention_mask, shape, device))


def _check_shape(attention_mask: Tensor, shape: Shape) -> None:
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise ValueError(
            f"FASA selects one set of valid keys for all heads, got an attention mask of shape "
            f"{tuple(attention_mask.shape)}; pass [batch, length], or [batch, 1, queries, keys]."
        )
    if torch.compiler.is_compiling():  # a graph would be guarded on the comparison
        return
    rows, _, q_len, kv_len = attention_mask.shape
    if rows not in (1, shape[0]) or (q_len, kv_len) != shape[1:]:
        raise ValueError(
            f"the attention mask has the shape {tuple(attention_mask.shape)}, the forward {shape[1]} queries and "
            f"{shape[2]} keys, with those of the cache; pass {(shape[0], 1, *shape[1:])}, or [batch, length]."
        )


def check_mask(attention_mask: Tensor, shape: Shape) -> None:
    """Refuse a mask of another shape, a mask that differs between heads, and an additive mask that contains a bias.

    The selection cannot follow a bias. On a GPU a forward of one token is not checked for it, since reading the mask
    would stall the device.

    Args:
        attention_mask: bool (True: attend) or additive float.
        shape: B, Q and T of the forward.

    Raises:
        ValueError: the mask is not [B or 1, 1, Q, T], or holds a value above -1000 other than 0.
    """
    _check_shape(attention_mask, shape)
    if not attention_mask.is_floating_point() or torch.compiler.is_compiling():
        return
    if attention_mask.is_cuda and attention_mask.shape[-2] == 1:
        return
    biased = (attention_mask > MASKED) & (attention_mask != 0)
    if biased.any():
        bias = float(attention_mask[biased][0])
        raise ValueError(
            f"the attention mask adds {bias:g} to a logit, which FASA's selection cannot follow; "
            "pass 0 for keys to attend to and torch.finfo(dtype).min for others, or disable FASA."
        )


def count_valid(attention_mask: Tensor | None, shape: Shape, device: torch.device) -> Tensor:
    """Count the valid keys of each query, as `valid_from_mask` marks them: int64 [B, Q]; None needs no mask tensor."""
    batch, q_len, kv_len = shape
    if attention_mask is None:
        counts = torch.arange(1, q_len + 1, device=device) if q_len > 1 else torch.full((1,), kv_len, device=device)
        return counts.expand(batch, -1)
    return valid_from_mask(attention_mask, shape, device).sum(-1)[:, 0, 0].expand(batch, -1)
