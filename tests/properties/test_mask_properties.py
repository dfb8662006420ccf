"""to_block_mask on arbitrary selections: the mask function is the selection, and the block list misses none of it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import budgets, cases, masks

from fasa_flex.core.budget import Budget
from fasa_flex.core.method import to_block_mask
from fasa_flex.core.selection import select, valid_keys


@cases(1)
@given(st.data())
def test_block_mask_is_the_selection(data: st.DataObject) -> None:
    """Row q * G + g of the mask is query q of the group's member g; every block in use is listed once, no other is."""
    batch, heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 8))
    length = data.draw(st.integers(1, 70))
    queries = data.draw(st.integers(1, length))
    kv_block = data.draw(st.sampled_from([1, 2, 3, 16, 128]))
    members = data.draw(st.sampled_from([1, group]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    scores = torch.randint(-3, 4, (batch, heads, members, queries, length), generator=generator).float()
    valid = valid_keys(queries, length, data.draw(masks(batch, length)), scores.device)
    selection = select(scores, valid, Budget(**data.draw(budgets(length))))
    block_mask = to_block_mask(selection, group, kv_block)

    rows = queries * group
    assert block_mask.BLOCK_SIZE[1] == kv_block
    assert block_mask.seq_lengths == (rows, length)
    b, h, row, slot = (
        torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate((batch, heads, rows, length))
    )
    dense = block_mask.mask_mod(b, h, row, slot).broadcast_to(batch, heads, rows, length)
    by_member = selection.mask.expand(-1, -1, group, -1, -1)
    for g in range(group):
        assert torch.equal(dense[:, :, g::group], by_member[:, :, g])

    q_block, kv_blocks = block_mask.BLOCK_SIZE[0], -(-length // kv_block)
    used = torch.zeros(batch, heads, -(-rows // q_block), kv_blocks, dtype=torch.bool)
    for x, y, z, t in dense.nonzero().tolist():
        used[x, y, z // q_block, t // kv_block] = True
    listed = torch.zeros_like(used)
    assert block_mask.kv_num_blocks.shape == used.shape[:3]
    assert block_mask.kv_indices.dtype == block_mask.kv_num_blocks.dtype == torch.int32
    assert ((block_mask.kv_indices >= 0) & (block_mask.kv_indices < kv_blocks)).all()
    for x, y, z in torch.cartesian_prod(*map(torch.arange, used.shape[:3])).view(-1, 3).tolist():
        count = int(block_mask.kv_num_blocks[x, y, z])
        blocks = block_mask.kv_indices[x, y, z, :count].tolist()
        assert blocks == sorted(set(blocks))  # in order: kernels read keys forward
        listed[x, y, z, blocks] = True
    assert torch.equal(listed, used)
    assert block_mask.full_kv_num_blocks is None
