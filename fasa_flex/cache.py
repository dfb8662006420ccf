"""FASA-C's cache: K and V whole, and beside them the dominant key dimensions, packed for TIP to stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fasa_flex.config import FasaConfig
from fasa_flex.layers import dense_layers
from fasa_flex.profile import FasaProfile
from fasa_flex.scoring import DominantChunks


class PackedLayer(DynamicLayer):
    """One layer's keys and values, and the scored dimensions of its keys, written once for each new token.

    Attributes:
        scorer: whose dimensions are packed; one set per key/value head.
        packed: float [B, Hkv, T, 2 * n_tip], always ``scorer.pack(keys)``; None while the layer is empty.
    """

    def __init__(self, scorer: DominantChunks) -> None:
        super().__init__()
        self.scorer = scorer
        self.packed: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D]; returns all of them."""
        packed = self.scorer.pack(key_states)
        self.packed = packed if self.packed is None else torch.cat([self.packed, packed], dim=2)
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return states

    def crop(self, *args: Any) -> None:
        """Drop tokens at the end, as `DynamicLayer.crop`."""
        super().crop(*args)
        self._change(lambda packed: packed[:, :, : self.get_seq_length()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._change(lambda packed: packed.index_select(0, beam_idx.to(packed.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda packed: packed.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self._change(lambda packed: packed[indices])

    def offload(self) -> None:
        """Move the layer to host memory."""
        super().offload()
        self._change(lambda packed: packed.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        super().prefetch()
        self._change(lambda packed: packed.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Empty the layer."""
        self.packed = None
        super().reset()

    def _change(self, change: Any) -> None:
        if self.packed is not None:
            self.packed = change(self.packed)


class FasaCache(DynamicCache):
    """A growing cache with packed dominant keys (FASA-C in the paper), passed as ``past_key_values=``.

    It costs ``n_tip / head_dim`` of the keys and values in memory, and the results are the same as without it. Layers
    that are dense under ``config``, have no RoPE or a sliding window hold keys and values alone.

    Args:
        model: the model that will fill it.
        profile: the model's.
        config: that of `enable`; None is the default.

    Raises:
        ValueError: the profile does not fit the model, or chunk sets per query head, which do not pack once a KV head.
    """

    def __init__(self, model: PreTrainedModel, profile: FasaProfile, config: FasaConfig | None = None) -> None:
        config = FasaConfig() if config is None else config
        profile.check_fits(model)
        if config.per != "kv_head":
            raise ValueError(
                f"packed keys need one chunk set per key/value head, got per={config.per!r}; use 'kv_head'."
            )
        super().__init__(config=model.config)
        dense = dense_layers(model, config.dense_layers, profile.layout.unrotated_layers)
        tables = profile.dominant_dims(config.chunks_of(profile.layout.head_dim))
        for layer, chunks in enumerate(tables):
            if type(self.layers[layer]) is DynamicLayer and layer not in dense:
                self.layers[layer] = PackedLayer(DominantChunks.from_chunks(chunks.to(model.device)))

    def packed_keys(self, layer: int, scorer: object) -> Tensor | None:
        """The packed keys of a layer, if they are the dimensions ``scorer`` scores: float [B, Hkv, T, 2 * n_tip]."""
        held = self.layers[layer]
        if not isinstance(held, PackedLayer) or not isinstance(scorer, DominantChunks):
            return None
        same = held.scorer is scorer or torch.equal(held.scorer.dims.cpu(), scorer.dims.cpu())
        if not same:
            raise ValueError(
                f"the cache packs other chunks of layer {layer} than this model scores; "
                "make the FasaCache with the profile and config that enable was given."
            )
        held.scorer = scorer
        return held.packed
