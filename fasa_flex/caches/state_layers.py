"""Cache layers that keep packed keys beside keys, values and a recurrent state, as in Falcon-H1, Zamba and Zaya.

transformers' own layers call the method of one base after the other's, so that the methods of packed layers, which call
the next class, change keys and state alike.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
)

from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer


class PackedStateLayer(PackedLayer, LinearAttentionAndFullAttentionLayer):
    """A growing layer with packed keys and a recurrent state."""


class StaticPackedStateLayer(StaticPackedLayer, LinearAttentionAndStaticFullAttentionLayer):
    """A static layer with packed keys and a recurrent state."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the buffers of keys and values (two arguments), or a state (by keyword)."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens from the end, where the state can be taken back.

        Raises:
            ValueError: ``tokens_to_remove`` is positive.
        """
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)
