"""A selection as a `BlockMask`: built with tensor operations alone, exact to the token.

Rows of the mask are the queries of one key/value head's group, query-major: row ``q * G + g``. So K and V are read once
a group, the mask has Hkv heads, and `flex_attention` needs no GQA flag (its decode kernel takes per-head masks only
then).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from fasa_flex.realize import realize
from fasa_flex.selection import Selection

Q_BLOCK = 128


def kv_block_size(device: torch.device) -> int:
    """Keys of a block: 1 where any size runs (CPU), 16, the smallest that Triton compiles, elsewhere."""
    return 1 if device.type == "cpu" else 16


def to_block_mask(selection: Selection, group: int, kv_block: int) -> BlockMask:
    """The `BlockMask` of selected tokens.

    Blocks are listed where any row of a query block selected a token in them, and the mask function decides token by
    token. All blocks are partial ones: on GPU a list of full blocks, even an empty one, unbalances the split of the
    decode kernel.

    Args:
        selection: with Hkv heads.
        group: G, query heads a key/value head.
        kv_block: keys of a block.

    Returns:
        for queries [B, Hkv, Q * G, D], row ``q * G + g``, and keys [B, Hkv, T, D].
    """
    mask = selection.mask.to(torch.int8)  # padding a bool gives CPU code that does not compile (torch 2.13)
    batch, heads, shared, q_len, kv_len = mask.shape
    rows, kv_blocks = q_len * group, -(-kv_len // kv_block)
    most = kv_blocks
    if q_len == 1:
        any_row = mask.amax(2)
        most = min(most, shared * selection.slots.shape[-1])
    else:
        by_row = mask.transpose(2, 3).expand(-1, -1, -1, group, -1).reshape(batch, heads, rows, kv_len)
        q_blocks = -(-rows // Q_BLOCK)
        padded = F.pad(by_row, (0, 0, 0, q_blocks * Q_BLOCK - rows))
        any_row = padded.view(batch, heads, q_blocks, Q_BLOCK, kv_len).amax(3)
    padded = F.pad(any_row, (0, kv_blocks * kv_block - kv_len))
    blocks = padded.view(batch, heads, -1, kv_blocks, kv_block).amax(-1)
    downward = torch.arange(kv_blocks, 0, -1, dtype=torch.int32, device=mask.device)
    listed = torch.where(blocks > 0, downward, 0).topk(most, dim=-1).indices.to(torch.int32)
    if mask.device.type == "cpu":
        listed = F.pad(listed, (0, kv_blocks - most))  # the CPU kernel wants a list as wide as the keys
    tokens = realize(selection.mask)

    def selected(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        member = row % group if shared > 1 else 0
        chosen: Tensor = tokens[b, h, member, row // group, slot]
        return chosen

    return BlockMask.from_kv_blocks(
        blocks.sum(-1, dtype=torch.int32).contiguous(),
        listed.contiguous(),
        BLOCK_SIZE=(Q_BLOCK, kv_block),
        mask_mod=selected,
        seq_lengths=(rows, kv_len),
        compute_q_blocks=False,
    )
