"""The arguments that one layer's attention receives in a probing forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fasa_flex.hf.head_shard import HeadShard


@dataclass(frozen=True, eq=False)
class Arrival:
    """Arguments of one layer's attention module and attention function in a probing forward.

    Attributes:
        module: the attention module.
        arguments: names of the module's keyword arguments that are not None.
        has_states: whether the module received hidden states in the place where `Fasa` reads them.
        cache: the cache among the module's arguments; None: no argument with a known name is a cache.
        query: float [rows, Hq, P, D], post-RoPE, on the CPU; without data for a model on the meta device.
        key_shape: [rows, Hkv, T, D].
        value_shape: [rows, Hkv, T, Dv].
        mask: attention mask that the attention function received.
        options: other keyword arguments of the attention function.
        calls: number of times that the layer called its attention function in the forward.
        keeps_keys: whether the cache holds separate keys for this layer.
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

    def whole(self, shard: HeadShard) -> Arrival:
        """Return the arguments with the heads of all ranks in query and shapes; every rank must call it."""
        query = self.query if self.query.is_meta else shard.whole(self.query, 1)
        key, value = (
            torch.Size((rows, shard.ranks * heads, *rest)) for rows, heads, *rest in (self.key_shape, self.value_shape)
        )
        return replace(self, query=query, key_shape=key, value_shape=value)
