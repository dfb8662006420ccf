"""The variants of decoding that the step benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface

from fasa_flex.bench import rivals
from fasa_flex.bench.settings import BACKENDS, Settings
from fasa_flex.core.config import Backend, FasaConfig


@dataclass(frozen=True)
class Variant:
    """One variant of decoding.

    Attributes:
        name: name in the table.
        kind: "dense" or "sparse".
        attention: name of a dense variant's attention function in transformers.
        backend: backend of a sparse variant.
        placement: memory of a sparse variant's keys and values: "device" (FASA-C) or "host" (FASA-M).
        new_rows: share of the selected rows that a step fetches from host memory. Every step decodes the same token, so
            this share is first marked as absent from the device.
        compiled: whether the whole step is compiled.
    """

    name: str
    kind: str
    attention: str = "sdpa"
    backend: str = "auto"
    placement: str = "device"
    new_rows: float = 1.0
    compiled: bool = False


def variants(settings: Settings) -> list[Variant]:
    """All variants for the settings."""
    dense = [
        Variant("transformers' SDPA", "dense"),
        Variant("SDPA", "dense", _register("sdpa", rivals.sdpa)),
        Variant("grouped SDPA", "dense", _register("grouped_sdpa", rivals.grouped_sdpa)),
    ]
    if settings.device.type == "cpu":
        dense.append(Variant("grouped matmul", "dense", _register("grouped_matmul", rivals.grouped_matmul)))
    sparse = [Variant(f"FASA-C {backend}", "sparse", backend=backend) for backend in _backends(settings)]
    host = [Variant("FASA-M", "sparse", placement="host")]
    if settings.device.type == "cuda":
        host.append(replace(host[0], name=f"FASA-M, {rivals.HALF_HELD}", new_rows=0.5))
    if ("triton" if settings.device.type == "cuda" else "gather") in settings.backends:
        host.append(Variant("FASA-C fastest", "sparse", backend="fastest"))  # on CPU it compiles sparse layers itself
    found = [*dense, *sparse] if "eager" in settings.modes else []
    if settings.device.type == "cuda":
        found.append(Variant("compiled flex", "dense", _register("flex", _flex_region(settings))))
    if "compiled" in settings.modes:
        found += [replace(v, name=f"{v.name}, compiled", compiled=True) for v in (*dense, *sparse, *host)]
    return [*found, *host]


def _backends(settings: Settings) -> list[Backend]:
    here = BACKENDS if settings.device.type == "cuda" else tuple(name for name in BACKENDS if name != "triton")
    return [name for name in here if name in settings.backends]


def _register(name: str, call: rivals.Call) -> str:
    """Register an attention call without mask in transformers; returns its name there."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        unused: Any = None
        return call(rivals.Inputs(query, key, value, unused, unused, unused)).transpose(1, 2).contiguous(), None

    AttentionInterface.register(f"fasa_bench_{name}", attend)
    return f"fasa_bench_{name}"


def _flex_region(settings: Settings) -> rivals.Call:
    run: Any = torch.compile(flex_attention, dynamic=settings.dynamic)
    return lambda x: run(x.q, x.k, x.v, enable_gqa=x.q.shape[1] != x.k.shape[1])


def config_of(variant: Variant, settings: Settings, dense_layers: tuple[int, ...]) -> FasaConfig:
    """The variant's `FasaConfig`."""
    fields: dict[str, Any] = {"n_tip": settings.n_tip, "n_fac": settings.n_fac, "group_reduce": settings.group_reduce}
    fields |= {"packed_dtype": settings.packed_dtype, "completion": settings.completion, "backend": variant.backend}
    return FasaConfig(dense_layers=dense_layers, **fields)
