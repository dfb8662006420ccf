"""What a model under FASA really did: dense and sparse queries, tokens attended, counted on its device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.budget import Budget
from fasa_flex.reads import ReadShare


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts.

    Attributes:
        dense_queries: queries that attended to every valid key.
        sparse_queries: queries with more valid keys than budget, which attended to a selection.
        mean_selected: tokens a sparse query attended to.
        mean_valid: valid keys a sparse query chose from.
        kv_bytes_share: bytes of keys and values that a sparse query read, ranking included, as a share of those that a
            dense one reads; None where the method does not state what it reads.
    """

    dense_queries: int
    sparse_queries: int
    mean_selected: float
    mean_valid: float
    kv_bytes_share: float | None


def tally(n_valid: Tensor, sparse: Tensor | None, budget: Budget) -> Tensor:
    """The counts of one forward of a layer: int64 [4], dense queries, sparse ones, tokens selected and valid for these.

    Args:
        n_valid: int64 [B, Q], valid keys of each query, 0 for one that is not counted.
        sparse: bool [B, Q], the queries that attended to a selection; None: none did.
        budget: theirs.
    """
    real = n_valid > 0
    if sparse is None:
        return F.pad(real.sum()[None], (0, 3))
    sparse = sparse & real
    selected = budget.mean(n_valid)
    return torch.stack([(real & ~sparse).sum(), sparse.sum(), (selected * sparse).sum(), (n_valid * sparse).sum()])


class FasaStats:
    """Counters of every layer, kept as tensors on the layers' devices: counting never waits for the device.

    Queries without a valid key (padding) are not counted.

    Args:
        devices: of the layers.
        reads: what a sparse query of a layer reads; layers without an entry do not say.
    """

    def __init__(self, devices: Sequence[torch.device], reads: Mapping[int, ReadShare | None]) -> None:
        self._reads = dict(reads)
        self._counts = [torch.zeros(4, dtype=torch.long, device=device) for device in devices]

    def add(self, layer: int, tally: Tensor) -> None:
        """Add a `tally` to the counts of a layer."""
        if self._counts[layer].device != tally.device:  # the model has moved since
            self._counts[layer] = self._counts[layer].to(tally.device)
        self._counts[layer].add_(tally)

    def reset(self) -> None:
        """Start counting anew."""
        for counts in self._counts:
            counts.zero_()

    @property
    def per_layer(self) -> list[LayerStats]:
        """Counts by layer."""
        stats = []
        for layer, counts in enumerate(self._counts):
            dense, sparse, selected, valid = counts.tolist()
            reads = self._reads.get(layer)
            share = None if reads is None else reads.of(selected, valid)
            stats.append(LayerStats(dense, sparse, selected / max(1, sparse), valid / max(1, sparse), share))
        return stats

    @property
    def dense_queries(self) -> int:
        """Dense queries, summed over layers."""
        return sum(layer.dense_queries for layer in self.per_layer)

    @property
    def sparse_queries(self) -> int:
        """Sparse queries, summed over layers."""
        return sum(layer.sparse_queries for layer in self.per_layer)

    @property
    def kv_share(self) -> float:
        """Share of their valid keys that sparse queries attended to, scoring not included; 1.0 if there were none."""
        layers = self.per_layer
        valid = sum(layer.mean_valid * layer.sparse_queries for layer in layers)
        selected = sum(layer.mean_selected * layer.sparse_queries for layer in layers)
        return selected / valid if valid else 1.0

    @property
    def kv_bytes_share(self) -> float | None:
        """Bytes that sparse queries read, ranking included, as a share of what dense ones read; None: not stated."""
        layers = [layer for layer in self.per_layer if layer.sparse_queries]
        if any(layer.kv_bytes_share is None for layer in layers):
            return None
        valid = sum(layer.mean_valid * layer.sparse_queries for layer in layers)
        read = sum((layer.kv_bytes_share or 0.0) * layer.mean_valid * layer.sparse_queries for layer in layers)
        return read / valid if valid else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Totals as JSON-ready values."""
        names = ("dense_queries", "sparse_queries", "kv_share", "kv_bytes_share")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"FasaStats({', '.join(f'{name}={value}' for name, value in self.as_dict().items())})"
