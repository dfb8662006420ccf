"""The paper's two caches: K and V whole, on the device (FASA-C) or in host memory (FASA-M), and packed dominant keys.

Packed keys are on the device in both, for TIP to stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from fasa_flex.caches.capacity import counted, make_room
from fasa_flex.caches.host_layers import HostLayer, OnHost, StaticHostLayer
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys, writable
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.packing import packs
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.caches.write_tracking import counting
from fasa_flex.calibration.profile import FasaProfile, check_kinds
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.budget import Budget, check_count
from fasa_flex.core.config import FasaConfig, check_choice
from fasa_flex.core.layer_budgets import spread_budget
from fasa_flex.core.packed_keys import packed_bytes
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.hf.model_structure import attention_modules, attention_shape, dense_layers, device_of
from fasa_flex.hf.wrappers import unwrapped

Placement = Literal["device", "host"]

_NOTHING_SAVED = "saves nothing for a model on the CPU, where both are host memory"


@dataclass(frozen=True)
class CacheSize:
    """What a cache holds, in bytes a token and layer over all key/value heads, room to grow included.

    Tokens are those of all rows: the ones held of a growing cache, the slots of a static one.

    Attributes:
        device: on the model's device.
        host: in host memory.
        dense: what keys and values alone would be, without room.
        formula: what the method needs on the device: of a sparse layer packed keys, the completion's state once
            attention has made it, and keys and values (FASA-C) or the ``n_fac`` rows held of them (FASA-M: none where
            the budget is a share or differs between heads); of a dense one keys and values.
        device_type: the model's, such as "cuda".
    """

    device: float
    host: float
    dense: float
    formula: float
    device_type: str

    @property
    def ratio(self) -> float:
        """``device`` against ``formula``: what room to grow costs, and which rows are held."""
        return self.device / self.formula

    def __str__(self) -> str:
        """The numbers in a sentence."""
        nothing = f"; placement='host' {_NOTHING_SAVED}" if self.host and self.device_type == "cpu" else ""
        return (
            f"{self.device:.1f} bytes a token and layer on the device, {self.ratio:.2f} times the formula's "
            f"{self.formula:.1f}, and {self.host:.1f} in host memory, where keys and values alone are {self.dense:.1f}"
            f"{nothing}."
        )


class FasaCache(Cache):
    """Keys, values and packed dominant keys, made ahead of the first forward: FASA-C or FASA-M in the paper.

    A model's forward and `generate` take it as ``cache=``, before transformers 5.24 as ``past_key_values=``.

    `enable` packs the layers of any growing or static cache by itself, so this one is for those who allocate theirs, or
    who want FASA-M: ``placement="host"`` keeps the keys and values of the sparse layers in host memory, and only the
    rows that a query selects cross to the device. Results are the same. Without an accelerator it runs, saves nothing,
    and warns of it. Packed keys cost ``n_tip / head_dim`` of the keys and values, less in a lower
    ``config.packed_dtype``. Layers that are dense under ``config``, have no RoPE or a sliding window hold keys and
    values alone, on the device.

    Packed keys follow ``layer.keys`` when they are replaced or written to in place; a write that PyTorch does not count
    (``keys.data``, NumPy, DLPack) is not seen, so call ``layer.repack(layer.scorer)`` behind one.

    A static cache that is full, or a host that has no more memory, is an error before anything is written: what the
    cache holds is as before.

    Args:
        model: the model that will fill it.
        profile: the model's.
        config: that of `enable`; None is the default.
        placement: where keys and values of sparse layers are, ``"device"`` or ``"host"``.
        max_cache_len: slots to allocate, for compiled decoding and CUDA graphs; None: the cache grows.

    Raises:
        ValueError: the profile does not fit the model, chunk sets per query head, which do not pack once a KV head, or
            settings that exclude each other.
    """

    layers: list[Any]

    def __init__(
        self,
        model: PreTrainedModel,
        profile: FasaProfile,
        config: FasaConfig | None = None,
        *,
        placement: Placement = "device",
        max_cache_len: int | None = None,
    ) -> None:
        model = unwrapped(model)
        config = FasaConfig() if config is None else config
        check_kinds(profile, config)
        profile.check_fits(model)
        check_choice("placement", placement, Placement)
        if max_cache_len is not None:
            check_count("max_cache_len", max_cache_len, 1)
        if config.per != "kv_head":
            raise ValueError(
                f"packed keys need one chunk set per key/value head, got per={config.per!r}; use 'kv_head'."
            )
        if placement == "host" and not packs(model):
            raise ValueError(
                f"placement='host' needs a cache of whole keys, which {type(model).__name__} (MLA) has not; "
                "use placement='device'."
            )
        if placement == "host" and device_of(model).type == "cpu":
            warnings.warn(
                f"placement='host' {_NOTHING_SAVED}; move the model to its accelerator first, or use 'device'.",
                stacklevel=2,
            )
        dense = dense_layers(model, config.dense_layers, profile.layout.unrotated_layers)
        make = dominant_chunks(profile, config)
        sparse = [layer for layer in range(len(profile.agreement)) if layer not in dense and packs(model)]
        budgets = spread_budget(config.budget, config.layer_budgets, sparse, kv_heads=attention_shape(model)[2])
        devices = {layer: device_of(module, model) for layer, module in attention_modules(model).items()}
        scorers = {layer: make(layer).to(devices[layer]) for layer in sparse}
        hold = {layer: _to_hold(budgets[layer], max_cache_len) for layer in sparse if placement == "host"}
        self._new_layers = partial(_new_layers, model.config, max_cache_len, scorers, hold)
        with counting():
            super().__init__(layers=self._new_layers())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, Hkv, t, D] of a layer behind those it holds; returns what attention is to see.

        The first layer makes room for all, so that none is ahead of another after an error.

        Raises:
            ValueError: a static cache is full, or the host has no memory; what the cache held is as before.
        """
        if torch.compiler.is_compiling():
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return updated
        if layer_idx == 0:
            make_room(self, key_states.shape[2])
        try:
            updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:  # raised again, once nothing is held in part
            if not self.layers[layer_idx].is_initialized:  # the first forward: what others hold, they hold of it
                self.layers = self._new_layers()
            raise
        return updated

    def reset(self) -> None:
        """Empty the cache; transformers 5.17 by itself would fill growing layers with zeros and keep their length."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # dropped first: zeros cannot be written to what inference mode made
                layer.is_initialized, layer.keys, layer.values = False, None, None
            for name, held in list(vars(layer).items()):
                if isinstance(held, Tensor) and not writable(held):
                    setattr(layer, name, held.clone())
        super().reset()

    @property
    def size(self) -> CacheSize:
        """Bytes a token and layer, as they are held now.

        Raises:
            ValueError: the cache is empty.
        """
        if not int(self.get_seq_length()):
            raise ValueError("an empty cache has no size; run a forward with it first.")
        device = host = dense = formula = 0.0
        for layer in self.layers:
            tokens = layer.keys.shape[0] * layer.keys.shape[2]
            plain = (layer.keys.nbytes + layer.values.nbytes) / tokens
            held = _storage_bytes(layer.keys, layer.values) / tokens
            on_host = isinstance(layer, OnHost)
            dense, host, device = dense + plain, host + held * on_host, device + held * (not on_host)
            if isinstance(layer, KeepsPackedKeys) and layer.packed is not None:
                device += layer.packed.n_bytes / tokens
                width = layer.scorer.dims.shape[1]
                formula += layer.keys.shape[1] * packed_bytes(width, layer.scorer.dtype, layer.keys.dtype)
            if isinstance(layer, KeepsPackedKeys) and layer.state is not None:
                device += layer.state.n_bytes / tokens
                formula += layer.state.n_bytes / tokens
            if isinstance(layer, OnHost):
                device += layer.resident.n_bytes / tokens if layer.resident is not None else 0
                formula += layer.hold * plain * layer.keys.shape[0] / tokens
            else:
                formula += plain
        count, where = len(self.layers), self.layers[0].device.type
        return CacheSize(device / count, host / count, dense / count, formula / count, where)


def _new_layers(
    config: PreTrainedConfig,
    max_cache_len: int | None,
    scorers: Mapping[int, DominantChunks],
    hold: Mapping[int, int],
) -> list[Any]:
    """Empty layers; those with rows to ``hold`` are in host memory, those with scorers pack."""
    if max_cache_len is None:
        layers = list(DynamicCache(config=config).layers)
    else:
        plain = StaticCache(config=config, max_cache_len=max_cache_len).layers
        layers = [counted(layer) if type(layer) is StaticLayer else layer for layer in plain]
    for layer, scorer in scorers.items():
        if max_cache_len is None:
            layers[layer] = HostLayer(scorer, hold[layer]) if layer in hold else PackedLayer(scorer)
        elif layer in hold:
            layers[layer] = StaticHostLayer(scorer, max_cache_len, hold[layer])
        else:
            layers[layer] = StaticPackedLayer(scorer, max_cache_len)
    return layers


def _storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the memory behind tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _to_hold(budget: Budget, slots: int | None) -> int:
    """Rows a head that the device holds between steps: what the kernels select, which is a count."""
    if not isinstance(budget.n_fac, int):
        return 0
    return budget.n_fac if slots is None else min(budget.n_fac, slots)
