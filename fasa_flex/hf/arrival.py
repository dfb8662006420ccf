"""What a probing forward sees arrive at the attention of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True, eq=False)
class Arrival:
    """What arrived at the attention of one layer.

    Attributes:
        module: the attention module.
        arguments: its keyword arguments that are not None, by name.
        has_states: whether it was handed hidden states, as `Fasa` reads them.
        cache: the cache among its arguments; None: none that is known by name.
        query: float [rows, Hq, P, D], post-RoPE, on the CPU (or without data, of a model on the meta device).
        key_shape: [rows, Hkv, T, D].
        value_shape: [rows, Hkv, T, Dv].
        mask: what the attention function was handed as such.
        options: its other keyword arguments.
        calls: how often the layer attended in the forward.
        keeps_keys: whether the cache holds keys of its own for the layer.
    """

    module: nn.Module
    arguments: frozenset[str]
    has_states: bool
    cache: Cache | None
    query: Tensor
    key_shape: torch.Size
    value_shape: torch.Size
    mask: Tensor | None
    options: Mapping[str, Any]
    calls: int = 1
    keeps_keys: bool = True

    @property
    def rotates(self) -> bool | None:
        """Whether queries differ from position to position, as far as half precision tells; None without data."""
        return None if self.query.is_meta else not is_still(self.query.flatten(0, 1).double())


def is_still(query: Tensor) -> bool:
    """Whether queries [rows, P, D] are the same at every position, as far as half precision tells."""
    return bool((query - query[:, :1]).abs().max() < query.abs().mean() / 8)
