"""One call of attention as transformers makes it: the record that the routing hands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.compatibility import CACHE_NAMES

AttentionResult = tuple[Tensor, Tensor | None]
"""Attention [B, Q, Hq, Dv], and attention weights [B, Hq, Q, T] if the implementation returns them."""


class DenseAttention(Protocol):
    """An attention function of transformers."""

    def __call__(  # noqa: D102 - see the class
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> AttentionResult: ...


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the cache among the keyword arguments of an attention module; None if there is none.

    Raises:
        ValueError: the cache is of another kind.
    """
    for name in CACHE_NAMES:
        cache = arguments.get(name)
        if isinstance(cache, Cache):
            return cache
        if cache is not None:
            raise ValueError(
                f"FASA reads a transformers Cache and the model was handed a {type(cache).__name__}; pass a Cache such "
                "as DynamicCache, or disable() FASA first."
            )
    return None


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of its attention function by an attention module.

    Attributes:
        layer: number of the layer, from 0.
        dense: the model's own attention function.
        module: the attention module.
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE, the keys of the cache and the new ones.
        value: float [B, Hkv, T, Dv].
        mask: the attention mask; None: the model passes none.
        options: the other keyword arguments.
    """

    layer: int
    dense: DenseAttention
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Factor that the softmax multiplies dot products by."""
        return self.options.get("scaling") or float(self.query.shape[-1] ** -0.5)

    def softmax(self, implementation: str) -> Softmax:
        """Read the model's softmax; ``implementation``: name of the model's own attention, such as "sdpa".

        Raises:
            ValueError: the implementation ignores the model's logit cap or its learned sinks.
        """
        options = self.options
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        if implementation == "sdpa" and (softcap is not None or sinks is not None):
            raise ValueError(
                f"{type(self.module).__name__} caps its logits or has learned sinks, which its implementation 'sdpa' "
                "leaves out; call model.set_attn_implementation('eager') before enable."
            )
        return Softmax(options.get("scaling") or float(self.query.shape[-1] ** -0.5), softcap, sinks)

    def mask_of_several(self, implementation: str) -> Tensor | None:
        """Return the mask of several queries; if the model passes none, it is None if causal, otherwise all keys.

        Without a mask, sdpa is causal unless ``is_causal`` is False, and eager attention sees every key, as in a
        decoder that is used bidirectionally.
        """
        stated = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if stated is None else stated
        if self.mask is not None or (causal and implementation == "sdpa"):
            return self.mask
        return self.query.new_ones(1, 1, self.query.shape[2], self.key.shape[2], dtype=torch.bool)

    def no_dropout(self) -> ValueError:
        """Make the error for a call with dropout, which sparse attention does not have."""
        return ValueError(f"{type(self.module).__name__} uses dropout, sparse attention does not; call model.eval().")

    def run_dense(self) -> AttentionResult:
        """Compute the model's own attention."""
        key, value = self.key.to(self.query.device), self.value.to(self.query.device)  # FASA-M: they are on the host
        return self.dense(self.module, self.query, key, value, self.mask, **self.options)
