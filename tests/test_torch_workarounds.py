"""Minimal reproductions of torch's faults that the package works around: one that passes ends its workaround.

Seen in torch 2.11 and 2.13. When a newer torch makes a test here fail, remove the workaround that the test names.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fasa_flex.core.compiler import realize

KEYS, BLOCK = 64, 16
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def attend(query: Tensor, key: Tensor, value: Tensor, selected: Tensor) -> Tensor:
    """All blocks of keys, of which a mask function takes the selected ones."""
    blocks = torch.arange(KEYS // BLOCK, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, 1), KEYS // BLOCK, dtype=torch.int32),
        blocks,
        BLOCK_SIZE=(128, BLOCK),
        mask_mod=lambda b, h, row, key: selected[b, h, row, key],
        seq_lengths=(query.shape[2], KEYS),
        compute_q_blocks=False,
    )
    out = flex_attention(query, key, value, block_mask=mask)
    assert isinstance(out, Tensor)
    return out


def arguments() -> list[Tensor]:
    return [torch.randn(1, 1, rows, 16) for rows in (4, KEYS, KEYS)] + [torch.randn(1, 1, 4, KEYS)]


def test_a_mask_function_may_not_read_what_its_graph_computes() -> None:
    """Works around it: `fasa_flex.core.method.to_block_mask`, by `realize`."""

    def plain(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, scores > scores.mean(-1, keepdim=True))

    def mended(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > scores.mean(-1, keepdim=True)))

    given = arguments()
    torch.testing.assert_close(torch.compile(mended, fullgraph=True)(*given), plain(*given))
    with pytest.raises(InductorError, match="NoValidChoicesError"):
        torch.compile(plain, fullgraph=True)(*given)


def test_nothing_may_follow_attention_in_its_graph() -> None:
    """Works around it: `fasa_flex.core.method.flex_focused`, by `realize`."""

    def plain(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > 0)) * 2.0 + 1.0

    with pytest.raises(InductorError, match="epilogue_nodes"):
        torch.compile(plain, fullgraph=True)(*arguments())
