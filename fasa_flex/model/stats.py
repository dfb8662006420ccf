"""Counts of a model under FASA, kept on its devices: dense and sparse queries, and tokens attended to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fasa_flex.core.budget import Budget
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.config import Completion, FasaConfig
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import attention_shape


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts.

    Attributes:
        dense_queries: queries that attended to every valid key.
        sparse_queries: queries with more valid keys than budget, which attended to a selection.
        mean_selected: mean number of tokens that a sparse query attended to, over queries and heads.
        mean_valid: mean number of valid keys of a sparse query.
        kv_bytes_share: bytes of keys and values that sparse queries read, including the ranking, as a share of the
            bytes that dense attention reads; None: the method does not state the bytes that it reads.
        block_queries: queries of a prefill by blocks.
        block_pairs: pairs of a block of queries and a block of keys that these attended to, summed over query heads.
        causal_pairs: pairs that dense attention would have attended to.
    """

    dense_queries: int
    sparse_queries: int
    mean_selected: float
    mean_valid: float
    kv_bytes_share: float | None
    block_queries: int = 0
    block_pairs: int = 0
    causal_pairs: int = 0


def tally(n_valid: Tensor, sparse: Tensor | None = None, budget: Budget | None = None) -> Tensor:
    """Count one forward of a layer: int64 [4], dense queries, sparse queries, and the latter's selected and valid keys.

    If heads have budgets of their own, the selected keys are summed over these heads.

    Args:
        n_valid: int64 [B, Q], number of valid keys of each query; 0: the query is not counted.
        sparse: bool [B, Q], the queries that attended to a selection; None: no query did.
        budget: budget of the sparse queries; required with ``sparse``.
    """
    real = n_valid > 0
    if sparse is None:
        return F.pad(real.sum()[None], (0, 3))
    assert budget is not None
    sparse = sparse & real
    selected = budget.total(n_valid)
    return torch.stack([(real & ~sparse).sum(), sparse.sum(), (selected * sparse).sum(), (n_valid * sparse).sum()])


def read_share(
    scorer: Scorer,
    model: PreTrainedModel,
    config: FasaConfig,
    packs: bool,
    completion: Completion,
    dtype: torch.dtype | None = None,
) -> ReadShare | None:
    """Bytes that a sparse query of a layer reads; None: the scorer does not state them.

    Args:
        scorer: scorer of the layer.
        model: the model of the layer.
        config: settings passed to `enable`.
        packs: whether caches hold packed keys, which the scorer then reads, and the completion's state.
        completion: how to estimate the unselected keys. Without a state it reads all keys and values; a mean value over
            all valid keys counts as a running sum.
        dtype: dtype of the cache; None: the model's.
    """
    head_dim, shard = attention_shape(model)[3], HeadShard.of(model)
    query_heads, kv_heads = shard.query_heads, shard.kv_heads
    reads, packed = scorer.reads(head_dim, query_heads, kv_heads), None
    if reads is None:
        return None
    if packs:
        packed = scorer.reads_packed(head_dim, dtype or model.dtype)
    if packed is not None:
        reads = replace(reads, ranking=packed)
    if completion != "none":
        first_order = completion == "first_order" and config.completion_strength != 0
        sums = isinstance(scorer, DominantChunks) and packs
        sums = sums or (not first_order and scorer.completes_by_all)
        reads = reads.completed(head_dim, first_order) if sums else replace(reads, ranking=1.0)
    by_head = config.per == "query_head" or config.group_reduce == "none"
    return reads.by_head(query_heads // kv_heads) if by_head else reads


class FasaStats:
    """Counters of every layer, kept as tensors on the layers' devices, so that counting does not synchronise.

    Queries without a valid key (padding) are not counted. The counts are of all heads, also in a process that computes
    some of them (`Budget.shard`).

    Attributes:
        interrupted: number of answers that other threads were generating when `Fasa.disable` made attention dense.

    Args:
        devices: device of each layer.
        reads: bytes that a sparse query reads, by layer; no entry or None: not stated.
        heads: number of heads with budgets of their own (`Budget.heads`), by layer; no entry: 1.
        settings: returns the criterion, packed dtype and completion in use.
        total: sums counts of the heads of one process over all processes (`HeadShard.total`).
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        reads: Mapping[int, ReadShare | None],
        heads: Mapping[int, int],
        settings: Callable[[], Mapping[str, str | None]] = dict,
        total: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self._reads, self._heads, self._settings, self._total = dict(reads), dict(heads), settings, total
        self.interrupted = 0
        with torch.inference_mode(False):  # inference tensors could not be written outside it
            self._counts = [torch.zeros(4, dtype=torch.long, device=device) for device in devices]
            self._blocks = [torch.zeros(3, dtype=torch.long, device=device) for device in devices]

    def add(self, layer: int, tally: Tensor) -> None:
        """Add a `tally` to the counts of a layer."""
        if self._counts[layer].device != tally.device:  # the model has moved since
            with torch.inference_mode(False):
                self._counts[layer] = self._counts[layer].to(tally.device)
        self._counts[layer].add_(tally)

    def read_blocks(self, layer: int, queries: Tensor, pairs: Tensor, heads: int) -> None:
        """Move queries that are counted as dense to those of a prefill by blocks.

        Args:
            layer: number of the layer.
            queries: int64, number of queries.
            pairs: int64 [2], result of `BlockLists.pairs`.
            heads: query heads that share a selection, for each of which the pairs count.
        """
        read = torch.stack([queries, *self._total(heads * pairs)])
        if self._blocks[layer].device != read.device:
            with torch.inference_mode(False):
                self._blocks[layer] = self._blocks[layer].to(read.device)
        self._blocks[layer].add_(read)
        self.add(layer, F.pad(-queries[None], (0, 3)))

    def reset(self) -> None:
        """Set all counts to 0."""
        self.interrupted = 0
        for counts in (*self._counts, *self._blocks):
            counts.zero_()

    @property
    def per_layer(self) -> list[LayerStats]:
        """Counts of each layer, by layer number."""
        stats = []
        for layer, (counts, blocks) in enumerate(zip(self._counts, self._blocks, strict=True)):
            dense, sparse, total, valid = counts.tolist()
            selected = total / self._heads.get(layer, 1)
            reads = self._reads.get(layer)
            share = None if reads is None else reads.of(selected, valid, sparse)
            means = (selected / max(1, sparse), valid / max(1, sparse))
            stats.append(LayerStats(dense, sparse, *means, share, *blocks.tolist()))
        return stats

    @property
    def dense_queries(self) -> int:
        """Number of dense queries, summed over layers."""
        return sum(layer.dense_queries for layer in self.per_layer)

    @property
    def sparse_queries(self) -> int:
        """Number of sparse queries, summed over layers."""
        return sum(layer.sparse_queries for layer in self.per_layer)

    @property
    def block_queries(self) -> int:
        """Number of queries of a prefill by blocks, summed over layers."""
        return sum(layer.block_queries for layer in self.per_layer)

    @property
    def block_share(self) -> float:
        """Share of the pairs of blocks of dense attention that a prefill by blocks attended to; 1.0 without one."""
        layers = self.per_layer
        causal = sum(layer.causal_pairs for layer in layers)
        return sum(layer.block_pairs for layer in layers) / causal if causal else 1.0

    @property
    def kv_share(self) -> float:
        """Share of the valid keys that sparse queries attended to, without scoring; 1.0 without sparse queries."""
        layers = self.per_layer
        valid = sum(layer.mean_valid * layer.sparse_queries for layer in layers)
        selected = sum(layer.mean_selected * layer.sparse_queries for layer in layers)
        return selected / valid if valid else 1.0

    @property
    def kv_bytes_share(self) -> float | None:
        """Bytes that sparse queries read, with ranking, as a share of dense attention's; None: not stated."""
        layers = [layer for layer in self.per_layer if layer.sparse_queries]
        if any(layer.kv_bytes_share is None for layer in layers):
            return None
        valid = sum(layer.mean_valid * layer.sparse_queries for layer in layers)
        read = sum((layer.kv_bytes_share or 0.0) * layer.mean_valid * layer.sparse_queries for layer in layers)
        return read / valid if valid else 1.0

    @property
    def settings(self) -> dict[str, str | None]:
        """Criterion, packed dtype and completion in use; None: not known yet, or not used."""
        return dict(self._settings())

    def as_dict(self) -> dict[str, Any]:
        """Totals over layers, and the settings in use, as JSON-ready values."""
        names = ["dense_queries", "sparse_queries", "kv_share", "kv_bytes_share"]
        names += ["block_queries", "block_share"] if self.block_queries else []
        return {**{name: getattr(self, name) for name in names}, **self.settings}

    def __repr__(self) -> str:
        return f"FasaStats({', '.join(f'{name}={value}' for name, value in self.as_dict().items())})"
