"""Cache layers that keep packed keys beside keys, values and a recurrent state, as in Falcon-H1, Zamba and Zaya.

transformers' combined layers call the method of each base class. The packed layers override these methods and pass each
call on to the next class, so one call changes keys, packed keys and state.
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
