"""to_block_mask: the block list names exactly the blocks in use, and the mask function is the selection itself."""

from __future__ import annotations

import pytest
import torch

from fasa_flex.budget import Budget
from fasa_flex.masks import to_block_mask
from fasa_flex.selection import select, valid_keys


@pytest.mark.parametrize("kv_block", [1, 4, 16])
@pytest.mark.parametrize(("group", "shared"), [(1, True), (3, True), (2, False)])
@pytest.mark.parametrize("queries", [1, 5])
def test_equals_the_selection(kv_block: int, group: int, shared: bool, queries: int) -> None:
    batch, heads, length = 2, 2, 37
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, heads, 1 if shared else group, queries, length, generator=generator)
    key_mask = torch.arange(length) >= torch.tensor([[0], [9]])
    selection = select(scores, valid_keys(queries, length, key_mask, scores.device), Budget(5))
    block_mask = to_block_mask(selection, group, kv_block)

    wanted = selection.mask.expand(-1, -1, group, -1, -1).transpose(2, 3).reshape(batch, heads, queries * group, length)
    for b in range(batch):
        for h in range(heads):
            listed = set()
            rows = block_mask.BLOCK_SIZE[0]
            for block_row in range(block_mask.kv_num_blocks.shape[-1]):
                count = int(block_mask.kv_num_blocks[b, h, block_row])
                blocks = block_mask.kv_indices[b, h, block_row, :count].tolist()
                assert len(set(blocks)) == len(blocks)
                members = wanted[b, h, block_row * rows : (block_row + 1) * rows]
                used = {slot // kv_block for slot in members.any(0).nonzero().flatten().tolist()}
                assert set(blocks) == used
                listed |= used
            assert listed
            for row in range(queries * group):
                for slot in range(length):
                    index = (torch.tensor(x) for x in (b, h, row, slot))
                    assert bool(block_mask.mask_mod(*index)) == bool(wanted[b, h, row, slot])
