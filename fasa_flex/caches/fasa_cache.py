"""The paper's two caches, with all keys and values on the device (FASA-C) or in host memory (FASA-M).

Both keep packed dominant keys on the device, where TIP reads them.
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
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from fasa_flex.caches.capacity import counted, make_room
from fasa_flex.caches.host_layers import HostLayer, OnHost, StaticHostLayer
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys, writable
from fasa_flex.caches.packing import packable_layers, packed_layer, packs
from fasa_flex.caches.write_tracking import counting
from fasa_flex.calibration.profile import FasaProfile, check_kinds
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.budget import Budget, check_count
from fasa_flex.core.config import FasaConfig, check_choice
from fasa_flex.core.layer_budgets import spread_budget
from fasa_flex.core.packed_keys import packed_bytes
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import attention_modules, attention_shape, dense_layers, device_of
from fasa_flex.hf.wrappers import unwrapped

Placement = Literal["device", "host"]

_NOTHING_SAVED = "saves nothing for a model on the CPU, where both are host memory"


@dataclass(frozen=True)
class CacheSize:
    """Size of a cache in bytes per token and layer, over all key/value heads of the process, with allocated free space.

    Tokens are counted over all batch rows: the tokens of a growing cache, the slots of a static one.

    Attributes:
        device: bytes on the model's device.
        host: bytes in host memory.
        dense: bytes of keys and values alone, without free space.
        formula: bytes that the method needs on the device. A dense layer needs keys and values. A sparse layer needs
            packed keys, the completion's state if it exists, and keys and values (FASA-C) or ``n_fac`` resident rows
            (FASA-M; none if the budget is a share or differs between heads).
        device_type: type of the model's device, such as "cuda".
    """

    device: float
    host: float
    dense: float
    formula: float
    device_type: str

    @property
    def ratio(self) -> float:
        """``device / formula``: the overhead of free space on the device."""
        return self.device / self.formula

    def __str__(self) -> str:
        """State the sizes in one sentence."""
        nothing = f"; placement='host' {_NOTHING_SAVED}" if self.host and self.device_type == "cpu" else ""
        return (
            f"{self.device:.1f} bytes a token and layer on the device, {self.ratio:.2f} times the formula's "
            f"{self.formula:.1f}, and {self.host:.1f} in host memory, where keys and values alone are {self.dense:.1f}"
            f"{nothing}."
        )


class FasaCache(Cache):
    """A cache of keys, values and packed dominant keys, made before the first forward: the paper's FASA-C or FASA-M.

    A model's forward and `generate` take it as ``cache=``, before transformers 5.24 as ``past_key_values=``.

    `enable` adds packed keys to any growing or static cache. Use this class to allocate the cache yourself, or for
    FASA-M: ``placement="host"`` keeps the keys and values of the sparse layers in host memory and copies only the
    selected rows to the device. The results are the same. Without an accelerator it works, saves nothing, and warns.
    Packed keys add ``n_tip / head_dim`` to the size of keys and values, less with a lower ``config.packed_dtype``.
    Layers that are dense under ``config`` or have a sliding window keep keys and values alone, on the device.

    If ``layer.keys`` are replaced or written to in place, the layer packs them again. It does not notice a write that
    PyTorch does not count (``keys.data``, NumPy, DLPack): call ``layer.repack(layer.scorer)`` after one.

    If a static cache is full or the host has no memory left, an error is raised before anything is written, and the
    contents of the cache are unchanged.

    Args:
        model: the model that will fill the cache.
        profile: profile of this model.
        config: settings passed to `enable`; None: the defaults.
        placement: memory for keys and values of sparse layers, ``"device"`` or ``"host"``.
        max_cache_len: number of slots to allocate, for compiled decoding and CUDA graphs; None: the cache grows.

    Raises:
        ValueError: the profile does not fit the model, the config has chunk sets per query head, which cannot be packed
            once per key/value head, or settings exclude each other.
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
                f"placement='host' needs keys in the cache, and {type(model).__name__} (MLA) keeps latents; "
                "use placement='device'."
            )
        if placement == "host" and device_of(model).type == "cpu":
            warnings.warn(
                f"placement='host' {_NOTHING_SAVED}; move the model to its accelerator first, or use 'device'.",
                stacklevel=2,
            )
        dense = dense_layers(model, config.dense_layers, profile.layout.unserved_layers)
        make = dominant_chunks(profile, config)
        able = packable_layers(model, alone=placement == "host") if packs(model) else []
        sparse = [layer for layer in able if layer not in dense]
        if placement == "host" and not sparse:
            raise ValueError(
                f"placement='host' finds no layer of {type(model).__name__} that is sparse and holds keys and values "
                "alone; use placement='device'."
            )
        shard = HeadShard.of(model)
        budgets = spread_budget(
            config.budget, config.layer_budgets, sparse, attention_shape(model)[2], (shard.rank, shard.ranks)
        )
        devices = {layer: device_of(module, model) for layer, module in attention_modules(model).items()}
        scorers = {layer: shard.scorer(make(layer)).to(devices[layer]) for layer in sparse}
        hold = {layer: _to_hold(budgets[layer], max_cache_len) for layer in sparse if placement == "host"}
        self._new_layers = partial(_new_layers, model.config, max_cache_len, scorers, hold)
        with counting():
            super().__init__(layers=self._new_layers())
        self._first = next((n for n, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, t, D] to a layer; return the keys and values to attend to.

        The first layer reserves space in all layers, so that they stay equally long after an error.

        Raises:
            ValueError: a static cache is full, or the host has no memory; the cache's contents are unchanged.
        """
        if torch.compiler.is_compiling():
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return updated
        if layer_idx == self._first:
            make_room(self, key_states.shape[2])
        try:
            updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:  # raised again: any error may come from a kernel or the allocator
            if not self.layers[layer_idx].is_initialized:  # first forward: the other layers hold nothing older
                self.layers = self._new_layers()
            raise
        return updated

    def reset(self) -> None:
        """Empty the cache; transformers 5.17 would fill growing layers with zeros and keep their length."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # the base class would write zeros, which inference tensors refuse
                layer.is_initialized, layer.keys, layer.values = False, None, None
            for held in (vars(layer), *(own for own in vars(layer).values() if isinstance(own, dict))):
                for name, states in list(held.items()):
                    if isinstance(states, Tensor) and not writable(states):
                        held[name] = states.clone()
        super().reset()

    @property
    def size(self) -> CacheSize:
        """Current size in bytes per token and layer.

        Raises:
            ValueError: the cache is empty.
        """
        if not int(self.get_seq_length()):
            raise ValueError("an empty cache has no size; run a forward with it first.")
        device = host = dense = formula = 0.0
        layers = [layer for layer in self.layers if getattr(layer, "keys", None) is not None]  # others keep states
        for layer in layers:
            tokens = layer.keys.shape[0] * layer.keys.shape[2]
            plain = (layer.keys.nbytes + layer.values.nbytes) / tokens
            stored = _storage_bytes(layer.keys, layer.values) / tokens
            on_host = isinstance(layer, OnHost)
            dense, host, device = dense + plain, host + stored * on_host, device + stored * (not on_host)
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
        count, where = len(layers), layers[0].device.type
        return CacheSize(device / count, host / count, dense / count, formula / count, where)


def _new_layers(
    config: PreTrainedConfig,
    max_cache_len: int | None,
    scorers: Mapping[int, DominantChunks],
    hold: Mapping[int, int],
) -> list[Any]:
    """Make empty layers: in host memory if listed in ``hold``, with packed keys if listed in ``scorers``."""
    if max_cache_len is None:
        layers = list(DynamicCache(config=config).layers)
    else:
        plain = StaticCache(config=config, max_cache_len=max_cache_len).layers
        layers = [counted(layer) if type(layer) is StaticLayer else layer for layer in plain]
    for layer, scorer in scorers.items():
        if layer not in hold:
            layers[layer] = packed_layer(layers[layer], scorer)
        elif max_cache_len is None:
            layers[layer] = HostLayer(scorer, hold[layer])
        else:
            layers[layer] = StaticHostLayer(scorer, max_cache_len, hold[layer])
    return layers


def _storage_bytes(*tensors: Tensor) -> int:
    """Size in bytes of the storages of the tensors; a shared storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _to_hold(budget: Budget, slots: int | None) -> int:
    """Number of resident rows per head between steps: the budget if it is one count, otherwise 0."""
    if not isinstance(budget.n_fac, int):
        return 0
    return budget.n_fac if slots is None else min(budget.n_fac, slots)
