"""What a model hands to its attention function: its softmax, and keys and lengths that cannot end well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasa_flex.softmax import Softmax


def softmax_of(module: nn.Module, query: Tensor, options: dict[str, Any], implementation: str) -> Softmax:
    """The model's own softmax, from the keyword arguments of its attention function.

    Raises:
        ValueError: the model's ``implementation`` leaves a part of it out.
    """
    softmax = Softmax(
        scaling=options.get("scaling") or query.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    if not softmax.plain and implementation == "sdpa":
        raise ValueError(
            f"{type(module).__name__} caps its logits or has learned sinks, which its implementation 'sdpa' leaves "
            "out; call model.set_attn_implementation('eager') before enable."
        )
    return softmax


def check_keys(layer: int, key: Tensor, n_valid: Tensor, limit: int | None) -> None:
    """Refuse what cannot end well; in decode a check would stall the device, NaN keys rank first there and show.

    Args:
        layer: its number.
        key: float [B, Hkv, T, D].
        n_valid: int64 [B, Q], valid keys of each query.
        limit: the longest sequence that the model takes; None: it states none.

    Raises:
        ValueError: a sequence that is too long, or NaN in the keys of a forward of several tokens.
    """
    if torch.compiler.is_compiling():
        return
    if limit is not None and key.shape[2] > limit < int(n_valid.max()):
        raise ValueError(
            f"the sequence has {int(n_valid.max())} tokens and the model takes at most {limit}; shorten the prompt."
        )
    if n_valid.shape[1] > 1 and key.isnan().any():
        raise ValueError(f"the keys of layer {layer} hold NaN; check the model's weights, its dtype and its inputs.")
