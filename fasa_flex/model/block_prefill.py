"""The prefill of one layer by blocks, in the place of the model's own dense attention."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from fasa_flex.core.config import FasaConfig
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult
from fasa_flex.model.forwards import Forwards
from fasa_flex.model.stats import FasaStats
from fasa_flex.model.visible import Visible
from fasa_flex.prefill.attention import attend_to_blocks, block_sparse_attention
from fasa_flex.prefill.estimators import BlockEstimator, Blocks
from fasa_flex.prefill.grid import Grid, check_causal
from fasa_flex.prefill.selection import BlockBudget, BlockLists, all_blocks


class BlockPrefill:
    """Sparse prefill of one layer.

    Args:
        number: number of the layer.
        config: settings passed to `enable`.
        estimator: estimates the attention between blocks.
        returns_weights: whether the model's own attention returns weights for ``output_attentions``.
        forwards: state of the current forward.
        stats: counts.
    """

    def __init__(
        self,
        number: int,
        config: FasaConfig,
        estimator: BlockEstimator,
        returns_weights: bool,
        forwards: Forwards,
        stats: FasaStats,
    ) -> None:
        self._number, self._backend, self._estimator = number, config.backend, estimator
        self._returns_weights, self._forwards, self._stats = returns_weights, forwards, stats
        self._budget = BlockBudget(config.prefill_share, config.prefill_mass)
        self._completes = config.prefill_completion == "mean"

    @torch.compiler.disable  # shapes depend on the lengths of the rows, and flex compiles for itself
    def attend(
        self,
        call: AttentionCall,
        scorer: DominantChunks,
        visible: Visible,
        sparse: Tensor | None,
        first_slot: int,
        softmax: Softmax,
    ) -> AttentionResult:
        """Compute attention by blocks for the queries that would be dense.

        Args:
            call: the layer's attention call.
            scorer: scorer of the layer.
            visible: valid keys of the forward.
            sparse: bool [B, Q], queries that select for themselves; None: none.
            first_slot: slot of the first query.
            softmax: softmax of the model's attention.
        """
        query = call.query
        key, value = call.key.to(query.device), call.value.to(query.device)  # FASA-M keeps them in host memory
        grid = self._grid(visible, first_slot)
        if grid is None or self._budget.covers(grid.n_keys):
            return call.run_dense()
        if call.options.get("dropout"):
            raise call.no_dropout()
        blocks = Blocks(query, key, scorer, grid.to(query.device), softmax)
        out, lists = block_sparse_attention(
            blocks, value, self._budget, self._estimator, self._backend, self._completes
        )
        queries = (grid.places >= 0).sum() * (len(query) // len(grid.places))
        self._stats.read_blocks(self._number, queries, lists.pairs(grid), query.shape[1] // lists.count.shape[1])
        parts = [(blocks, lists), *self._behind(blocks, visible, sparse, first_slot)]
        for part in parts[1:]:
            out = out + attend_to_blocks(*part, value, self._backend)
        weights = None
        if call.options.get("output_attentions") and self._returns_weights:
            ones = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
            weights = torch.stack([attend_to_blocks(*part, ones, "gather", self._completes) for part in parts]).sum(0)
        return out.transpose(1, 2).contiguous(), weights

    def _grid(self, visible: Visible, first_slot: int) -> Grid | None:
        """The grid of a forward's queries before the boundary, which all layers share; None: there are none."""
        now, mask, boundary = self._forwards.now, visible.mask, self._forwards.boundary
        if now.grid is not None:
            held, shape, grid = now.grid
            if shape == visible.shape and (held is None if mask is None else held is not None and held() is mask):
                return grid
        last, number = visible.last()
        if mask is not None:
            check_causal(visible.valid(), visible.n_valid, last, number)
        before = None if boundary is None else ~boundary.behind(first_slot, visible.shape[1], visible.device)
        grid = Grid.of(visible.n_valid, number, before)
        now.grid = (None if mask is None else weakref.ref(mask), visible.shape, grid)
        return grid

    def _behind(
        self, blocks: Blocks, visible: Visible, sparse: Tensor | None, first_slot: int
    ) -> list[tuple[Blocks, BlockLists]]:
        """The queries behind a boundary that attend to all keys, since their budget covers these."""
        boundary = self._forwards.boundary
        if boundary is None:
            return []
        dense = boundary.behind(first_slot, visible.shape[1], visible.device)
        grid = Grid.of(visible.n_valid, visible.last()[1], dense if sparse is None else dense & ~sparse)
        if grid is None:
            return []
        grid = grid.to(blocks.query.device)
        return [(replace(blocks, grid=grid), all_blocks(grid, *blocks.key.shape[:2]))]
