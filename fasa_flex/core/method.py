"""The method on a page: score, rank, select, mask, attend, complete.

A `Call` is one layer's attention of one forward. `attend` computes it in PyTorch's own operations; compiled with
`flex_focused`, Inductor makes one sparse kernel of the attention to a selection. That is the definition, for any number
of queries, any scorer and any device. Other backends compute the same and are tested against it, as both are against
plain loops in float64: on a GPU `fasa_flex.backends.triton.decode` is several times as fast for a decoded token, on a
CPU the gather of `fasa_flex.backends.gather` is (`fasa_flex.backends.table` chooses).

Shapes: B rows, Q queries and T keys of D dimensions; G = Hq / Hkv query heads share a key/value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fasa_flex.core.budget import Budget
from fasa_flex.core.compiler import read_as_floats, realize
from fasa_flex.core.completion import Completion, completed, kept_share
from fasa_flex.core.config import GroupReduce
from fasa_flex.core.group_reduce import reduce_group, weigh
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.resident_rows import ResidentRows
from fasa_flex.core.scoring import DominantChunks, Scorer, check_scores
from fasa_flex.core.selection import Marks, Selection, select
from fasa_flex.core.softmax import Softmax

Focus = Callable[[Tensor, Tensor, Tensor, Selection, Softmax], "tuple[Tensor, Tensor | None]"]
"""Exact attention to a selection: from query, key and value to [B, Hq, Q, Dv], without learned sinks, and for a model
that has them the log-sum-exp of the logits, float32 [B, Hq, Q]."""

Q_BLOCK = 128
"""Rows of a block of queries."""


@dataclass(slots=True, eq=False)
class Call:
    """One layer's attention of one forward, as every backend is handed it.

    Attributes:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE; on another device than the query where a cache keeps it in host memory.
        value: float [B, Hkv, T, Dv], likewise.
        scorer: ranks the keys.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        budget: how many of them it attends to.
        group_reduce: how the query heads of a group rank as one.
        softmax: the model's.
        packed_keys: what the scorer reads instead of the keys, if a cache holds it.
        resident: the rows that the device holds of keys and values in host memory (FASA-M).
        marks: those of the valid keys; None: to be made.
        completion: None: the unselected keys have no weight.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scorer: Scorer
    valid: Tensor
    budget: Budget
    group_reduce: GroupReduce
    softmax: Softmax
    packed_keys: PackedKeys | Tensor | None = None
    resident: ResidentRows | None = None
    marks: Marks | None = None
    completion: Completion | None = None

    def known_marks(self) -> Marks:
        """`marks`, made where there are none."""
        if self.marks is None:
            samples = self.group_reduce == "softmax" or self.completion is not None
            self.marks = Marks.of(self.valid, self.budget, samples)
        return self.marks


def attend(call: Call, focus: Focus) -> Tensor:
    """Frequency-aware sparse attention, [B, Hq, Q, Dv].

    The paper's TIP scores and selects, its FAC is ``focus``. The estimated logits that rank the keys say how much of
    the attention the selected keys hold, too; the rest is completed.
    """
    marks, valid = call.marks or call.known_marks(), read_as_floats(call.valid)
    scores = call.scorer(call.query, call.key, call.packed_keys)  # [B, Hkv, G, Q, T]
    if not isinstance(call.scorer, DominantChunks):
        check_scores(scores, call.query, call.key)
    logits = weights = share = None
    if call.completion is not None:
        assert marks.sample is not None
        logits = call.softmax.logits(scores)
        weights = weigh(logits, valid, marks.sample)
    if weights is not None and call.group_reduce == "softmax" and scores.shape[2] > 1:
        ranking = weights.ranking  # [B, Hkv, 1, Q, T]
    else:
        ranking = reduce_group(scores, valid, call.group_reduce, call.softmax, marks.sample)
    selection = select(ranking, valid, call.budget, marks.forced)
    focus = getattr(call.scorer, "attend", focus)
    out, lse = focus(call.query, call.key, call.value, selection, call.softmax)
    if logits is not None and weights is not None:
        share = kept_share(logits, weights, selection)
    states = (call.query, call.key, call.value, call.valid)
    return completed(out, lse, share, call.completion, call.softmax, *states)


def flex_focused(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """`flex_attention` over the selection's block mask; the group's query heads are folded into its rows.

    To be compiled: eager `flex_attention` ignores the block list and computes every score. Rows are query-major, row
    ``q * G + g``, so that K and V are read once a group and the mask has Hkv heads.

    Returns:
        as `Focus`.
    """
    batch, query_heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    group = query_heads // kv_heads
    block_mask = to_block_mask(selection, group, kv_block_size(query.device))
    rows = query.view(batch, kv_heads, group, q_len, head_dim).transpose(2, 3).reshape(batch, kv_heads, -1, head_dim)
    # torch 2.13's CPU template for one query misreads folded queries; a partition longer than any cache switches it
    # off.
    options: Any = {"PARTITION_SIZE": 1 << 20} if query.device.type == "cpu" else None
    out: Any = flex_attention(
        realize(rows),
        key,
        value,
        score_mod=None if softmax.softcap is None else lambda score, b, h, row, slot: softmax.cap(score),
        block_mask=block_mask,
        scale=softmax.scaling,
        kernel_options=options,
        return_aux=None if softmax.sinks is None else AuxRequest(lse=True),
    )
    out, lse = out if isinstance(out, tuple) else (out, None)
    if query.device.type == "cpu":  # whose template takes in nothing that follows it (torch 2.13)
        out = realize(out)
    by_head: Tensor = out.view(batch, kv_heads, q_len, group, -1).transpose(2, 3)
    if lse is not None:
        lse = lse.lse.view(batch, kv_heads, q_len, group).transpose(2, 3).reshape(batch, query_heads, q_len)
    return by_head.reshape(batch, query_heads, q_len, -1), lse


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
