"""to_block_mask: the block list names exactly the blocks in use, and the mask function is the selection itself."""

from __future__ import annotations

import pytest
import torch

from fasa_flex.core.budget import Budget
from fasa_flex.core.method import kv_block_size, to_block_mask
from fasa_flex.core.selection import Selection, select, valid_keys


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


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kv_block", [1, 16])
def test_shape_of_the_lists(queries: int, kv_block: int) -> None:
    """Query blocks of 128; lists as wide as the keys, which the CPU kernel wants; no lists for a backward pass."""
    scores = torch.zeros(1, 2, 1, queries, 37)
    block_mask = to_block_mask(select(scores, valid_keys(queries, 37, None, scores.device), Budget(5)), 4, kv_block)
    assert tuple(block_mask.BLOCK_SIZE) == (128, kv_block)
    assert block_mask.kv_indices.shape == (1, 2, 1, -(-37 // kv_block))
    assert block_mask.kv_num_blocks.shape == (1, 2, 1)
    assert block_mask.q_indices is None
    assert block_mask.q_num_blocks is None


@pytest.mark.parametrize(("shared", "width"), [(1, 5), (4, 20)])
def test_lists_off_the_cpu_hold_no_more_than_one_query_can_select(shared: int, width: int) -> None:
    """On a device that computes nothing: the group's selections of 5 keys touch at most so many blocks."""
    shape = (1, 2, shared, 1)
    slots, order = torch.empty(*shape, 5, dtype=torch.long), torch.empty(*shape, 37, dtype=torch.long)
    taken = torch.empty(*shape, 5, dtype=torch.bool)
    selection = Selection(slots.to("meta"), taken.to("meta"), order.to("meta"))
    assert to_block_mask(selection, 4, 1).kv_indices.shape == (1, 2, 1, width)
    assert to_block_mask(selection, 4, 16).kv_indices.shape == (1, 2, 1, 3)


def test_on_cpu_no_block_holds_a_key_that_was_not_selected() -> None:
    """Any size runs there, and a larger one would have keys read for nothing."""
    scores = torch.zeros(1, 2, 1, 1, 37).index_fill(-1, torch.tensor([3, 11, 30]), 1.0)
    selection = select(scores, valid_keys(1, 37, None, scores.device), Budget(3))
    block_mask = to_block_mask(selection, 4, kv_block_size(scores.device))
    assert block_mask.kv_num_blocks.flatten().tolist() == [3, 3]
    assert block_mask.kv_indices[..., :3].sort().values.flatten().tolist() == [3, 11, 30] * 2


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_off_the_cpu_a_block_is_no_smaller_than_triton_compiles(device: str) -> None:
    """Its products of matrices have sides of 16 or more, and flex_attention takes whole blocks of 128 queries."""
    size = kv_block_size(torch.device(device))
    assert size >= 16
    assert 128 % size == 0
