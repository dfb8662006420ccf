"""Packed keys and completion states of one layer beside the pages of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.triton.dispatch import serves_pages
from fasa_flex.core.budget import SINKS
from fasa_flex.core.completion import BLOCK, CompletionState
from fasa_flex.core.packed_keys import PackedKeys, convert_rows
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.continuous_batching import Pages
from fasa_flex.paged.book import Cover, Places, Plan


class PackedPages:
    """The packed keys of one layer, in blocks with the numbers of the cache's blocks.

    A request that shares a block of keys shares its packed keys.

    Args:
        pages: the layer's pages.
        scorer: sets the packed dimensions and their precision.

    Attributes:
        scorer: the scorer.
        keys: the packed keys of each block, in rows: [blocks, Hkv, page, P, 1].
    """

    def __init__(self, pages: Pages, scorer: DominantChunks) -> None:
        self.scorer = scorer
        heads, width = scorer.dims.shape
        codes, scales = convert_rows(pages.keys.new_zeros(1, width), scorer.dtype)
        with torch.inference_mode(False):  # a manager in inference mode and one outside may follow each other
            shape, device = (pages.blocks, heads, pages.page), pages.keys.device
            tiles = torch.zeros(*shape, codes.shape[1], 1, dtype=codes.dtype, device=device)
            factors = None if scales is None else torch.zeros(*shape, 1, dtype=scales.dtype, device=device)
        self.keys = PackedKeys(tiles, factors)

    def write(self, keys: Tensor, places: Places) -> None:
        """Pack keys, float [N, Hkv, D], to these places."""
        codes, scales = convert_rows(self.scorer.pack(keys.transpose(0, 1)[None])[0], self.scorer.dtype)
        self.keys.tiles[places.blocks, :, places.offsets] = codes.transpose(0, 1)[..., None]
        if self.keys.scales is not None and scales is not None:
            self.keys.scales[places.blocks, :, places.offsets] = scales.T[..., None]


def write_states(
    pages: Pages, packed: PackedPages | None, key: Tensor, value: Tensor, places: Places, written: bool
) -> None:
    """Write new tokens: keys [N, Hkv, D] and values [N, Hkv, Dv] if they are not ``written`` yet, and packed keys."""
    if packed is not None and serves_pages(key, value, pages.keys, pages.values):
        from fasa_flex.backends.triton.writing import write_pages  # Triton is installed with CUDA only

        scorer, scales = packed.scorer, packed.keys.scales
        mean_key = None if scorer.mean_key is None else scorer.mean_key.contiguous()
        codes = packed.keys.tiles.squeeze(4), None if scales is None else scales.squeeze(3)
        rows = (key, value, pages.keys, pages.values)
        write_pages(*rows, *codes, scorer.dims.contiguous(), mean_key, *places, pages.stride)
        return
    if not written:
        rows_of = places.rows(pages.stride)
        pages.keys[rows_of], pages.values[rows_of] = key, value
    if packed is not None:
        packed.write(key, places)


class States:
    """The completion states of one layer, a row for each request.

    Args:
        pages: the layer's pages.
        first_order: whether the states hold the covariance.

    Attributes:
        all: the states, a row for each slot.
    """

    def __init__(self, pages: Pages, first_order: bool) -> None:
        self._first_order = first_order
        self.all = self._empty(pages, 1)

    def _empty(self, pages: Pages, rows: int) -> CompletionState:
        key, value = (states[:0].transpose(0, 1).expand(rows, -1, -1, -1) for states in (pages.keys, pages.values))
        with torch.inference_mode(False):
            return CompletionState.empty(key, value, self._first_order)

    def begin(self, pages: Pages, plan: Plan, slots: int) -> None:
        """Begin a plan's new states; ``slots``: number of states to hold."""
        have = len(self.all.covered)
        if slots > have:
            grown = self._empty(pages, max(slots, 2 * have))
            for former, tensor in zip(self.all.tensors, grown.tensors, strict=True):
                tensor[:have] = former
            self.all = grown
        if plan.begun is not None:
            for tensor in self.all.tensors:
                tensor.index_fill_(0, plan.begun, 0)

    def advance(self, pages: Pages, plan: Plan) -> None:
        """Extend states by a plan's tokens. A kernel finds them itself, so that a CUDA graph can replay it.

        Raises:
            NotImplementedError: the kernel cannot read the pages, in a CUDA graph.
        """
        if plan.covering is None and plan.room is None:
            return
        if serves_pages(pages.keys, pages.values, pages.keys, pages.values):
            from fasa_flex.backends.triton.completion import cover_pages_by_kernel  # Triton is installed with CUDA only

            where = (plan.lengths, plan.table, plan.slots, pages.page, pages.stride)
            cover_pages_by_kernel(self.all, pages.keys, pages.values, *where, BLOCK, SINKS)
            return
        if plan.room is not None:
            raise NotSupportedError(
                f"a CUDA graph needs the kernel of the completion, which cannot read a cache on {pages.keys.device}; "
                "pass ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        for cover in plan.covers:
            self._cover(pages, cover)

    def _cover(self, pages: Pages, cover: Cover) -> None:
        """Take in the tokens of all requests at once, as `fasa_flex.core.completion.cover_blocks` does by row."""
        state, at = self.all, cover.slots
        rows = cover.places.rows(pages.stride).view(len(at), -1)
        key, value = (states[rows].transpose(1, 2).float() for states in (pages.keys, pages.values))
        key = key[..., : state.key_sum.shape[2]]
        key_sum, value_sum = state.key_sum[at] + key.sum(2), state.value_sum[at] + value.sum(2)
        with torch.autocast(key.device.type, enabled=False):  # the covariance is a difference of large sums
            product = state.product[at] + key.mT @ value
        count = (cover.covered - SINKS)[:, None, None]
        mean = value_sum / count
        covariance = (product - key_sum[..., None] * mean[:, :, None]) / count[..., None]
        covered = cover.covered[:, None].expand(-1, key.shape[1])
        for tensor, new in zip(state.tensors, (covered, key_sum, value_sum, product, mean, covariance), strict=True):
            tensor[at] = new.to(tensor.dtype)
