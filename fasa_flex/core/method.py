"""The method on a page: score, rank, select, mask, attend, complete.

A `Call` holds the inputs of one layer's attention in one forward. `attend` computes it with PyTorch operations. When it
is compiled with `flex_focused`, Inductor generates one block-sparse kernel for the attention to the selected keys. This
is the definition of the method for any number of queries, any scorer and any device. Tests compare the other backends
with it, and all of them with plain loops in float64. For one decoded token two backends are several times as fast:
`fasa_flex.backends.triton.decode` on a GPU and `fasa_flex.backends.gather` on a CPU (`fasa_flex.backends.table`
chooses).

Shapes: B batch rows, Q queries, T keys of D dimensions; G = Hq / Hkv query heads share one key/value head.
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
from fasa_flex.core.compiler import compute_once, read_as_floats, realize
from fasa_flex.core.completion import Completion, completed, kept_share
from fasa_flex.core.config import GroupReduce
from fasa_flex.core.group_reduce import reduce_group, weigh
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.ranking import where_reached
from fasa_flex.core.resident_rows import ResidentRows
from fasa_flex.core.scoring import DominantChunks, Scorer, check_scores
from fasa_flex.core.selection import Marks, Selection, select
from fasa_flex.core.softmax import Softmax

Focus = Callable[[Tensor, Tensor, Tensor, Selection, Softmax], "tuple[Tensor, Tensor | None]"]
"""Computes exact attention to the selected keys. It returns the output [B, Hq, Q, Dv] without learned sinks, and for a
model with learned sinks also the log-sum-exp of the logits, float32 [B, Hq, Q]."""

Q_BLOCK = 128
"""Query rows in one block of the block mask."""


@dataclass(slots=True, eq=False)
class Call:
    """The inputs of one layer's attention in one forward; every backend takes this record.

    Attributes:
        query: float [B, Hq, Q, D], post-RoPE.
        key: float [B, Hkv, T, D], post-RoPE; in host memory if the cache keeps keys there (FASA-M).
        value: float [B, Hkv, T, Dv], on the device of ``key``.
        scorer: computes the scores that rank the keys.
        valid: bool [B or 1, 1, 1, Q, T], the keys that each query may attend to.
        budget: number of valid keys that each query attends to.
        group_reduce: how the scores of a group's query heads become one ranking.
        softmax: scaling, logit cap and learned sinks of the model's attention.
        packed_keys: the keys at the dominant dimensions, which the scorer reads in place of ``key``; None: no cache
            holds them.
        resident: selected rows of keys and values that the device keeps when the cache is in host memory (FASA-M).
        marks: forced and sampled keys; None: `known_marks` computes them from ``valid``.
        completion: how to estimate the contribution of the unselected keys; None: they have weight 0.
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
        """Return `marks`; compute them on first use."""
        if self.marks is None:
            samples = self.group_reduce == "softmax" or self.completion is not None
            self.marks = Marks.of(self.valid, self.budget, samples)
        return self.marks


def attend(call: Call, focus: Focus) -> Tensor:
    """Compute frequency-aware sparse attention, [B, Hq, Q, Dv].

    Scoring and selection are the paper's TIP, ``focus`` is its FAC. With a completion, the estimated logits that rank
    the keys also give the share of attention mass on the selected keys; an estimate replaces the rest.
    """
    marks, valid = call.marks or call.known_marks(), call.valid
    if torch.compiler.is_compiling():
        valid = read_as_floats(valid)
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
    focus = call.scorer.attend or focus
    out, lse = focus(call.query, call.key, call.value, selection, call.softmax)
    if logits is not None and weights is not None:
        share = kept_share(logits, weights, selection)
    states = (call.query, call.key, call.value, call.valid)
    return completed(out, lse, share, call.completion, call.softmax, *states)


def flex_focused(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """Run `flex_attention` with the block mask of the selection; the query heads of a group become rows of one head.

    Compile this function: eager `flex_attention` ignores the block list and computes every score. Query head g of query
    q is row ``q * G + g``, so that each group reads K and V once and the mask has Hkv heads.

    Returns:
        output and log-sum-exp, as `Focus` states them.
    """
    batch, query_heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    group = query_heads // kv_heads
    block_mask = to_block_mask(selection, group, kv_block_size(query.device))
    rows = query.view(batch, kv_heads, group, q_len, head_dim).transpose(2, 3).reshape(batch, kv_heads, -1, head_dim)
    # torch 2.13: the CPU template for one query needs full blocks; a partition longer than any cache disables it
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
    if query.device.type == "cpu":  # the CPU template cannot fuse the operations that follow it (torch 2.13)
        out = realize(out)
    by_head: Tensor = out.view(batch, kv_heads, q_len, group, -1).transpose(2, 3)
    if lse is not None:
        lse = lse.lse.view(batch, kv_heads, q_len, group).transpose(2, 3).reshape(batch, query_heads, q_len)
    return by_head.reshape(batch, query_heads, q_len, -1), lse


def kv_block_size(device: torch.device) -> int:
    """Number of keys in one block: 1 on a CPU, elsewhere 16, the smallest size that Triton compiles."""
    return 1 if device.type == "cpu" else 16


def to_block_mask(selection: Selection, group: int, kv_block: int) -> BlockMask:
    """Build the `BlockMask` of the selected tokens.

    The mask lists a key block if any row of the query block selected a token in it; the mask function then decides for
    each token. For one query the list comes from the selected slots; only the ranking is as long as the keys. All
    blocks are listed as partial: on a GPU a list of full blocks, even an empty one, unbalances how the decode kernel
    splits the work.

    Args:
        selection: selected slots, with Hkv heads.
        group: G, query heads per key/value head.
        kv_block: keys in one block.

    Returns:
        a mask for queries [B, Hkv, Q * G, D], with rows ``q * G + g``, and keys [B, Hkv, T, D].
    """
    shared, q_len, kv_len = selection.order.shape[2:]
    rows, kv_blocks = q_len * group, -(-kv_len // kv_block)
    if q_len == 1:
        number, listed = _blocks_of_slots(selection, kv_block)
        order, lowest = compute_once(selection.order), compute_once(selection.lowest)
    else:
        number, listed = _blocks_of_rows(selection, group, kv_block)
        order, lowest = realize(selection.mask), None
    if order.device.type == "cpu":
        listed = F.pad(listed, (0, kv_blocks - listed.shape[-1]))  # its kernel needs one entry for each block of keys

    def selected(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        member, query = row % group if shared > 1 else 0, row // group
        chosen: Tensor = order[b, h, member, query, slot]
        return chosen if lowest is None else chosen >= lowest[b, h, member, query, 0]

    return BlockMask.from_kv_blocks(
        number.contiguous(),
        listed.contiguous(),
        BLOCK_SIZE=(Q_BLOCK, kv_block),
        mask_mod=selected,
        seq_lengths=(rows, kv_len),
        compute_q_blocks=False,
    )


def _blocks_of_slots(selection: Selection, kv_block: int) -> tuple[Tensor, Tensor]:
    """Number and ascending list of the blocks of keys with a slot of one query: int32 [B, Hkv, 1] and [B, Hkv, 1, N].

    No more than the group's selections of K keys: N is at most their number.
    """
    kv_blocks = -(-selection.order.shape[-1] // kv_block)
    blocks = torch.where(selection.taken, selection.slots // kv_block, kv_blocks).flatten(2).to(torch.int32)
    blocks = blocks[:, :, None].sort(-1).values
    distinct = (blocks != F.pad(blocks[..., :-1], (1, 0), value=-1)) & (blocks < kv_blocks)
    number = distinct.cumsum(-1, dtype=torch.int32)
    listed = blocks.gather(-1, where_reached(number, min(kv_blocks, blocks.shape[-1])))
    return number[..., -1], listed.clamp(max=kv_blocks - 1)


def _blocks_of_rows(selection: Selection, group: int, kv_block: int) -> tuple[Tensor, Tensor]:
    """Number and list of the blocks with a slot of each block of rows: int32 [B, Hkv, N] and [B, Hkv, N, blocks]."""
    mask = selection.mask.to(torch.int8)  # a padded comparison does not compile for a CPU (torch 2.13)
    batch, heads, _, q_len, kv_len = mask.shape
    rows, kv_blocks = q_len * group, -(-kv_len // kv_block)
    by_row = mask.transpose(2, 3).expand(-1, -1, -1, group, -1).reshape(batch, heads, rows, kv_len)
    q_blocks = -(-rows // Q_BLOCK)
    padded = F.pad(by_row, (0, 0, 0, q_blocks * Q_BLOCK - rows))
    any_row = padded.view(batch, heads, q_blocks, Q_BLOCK, kv_len).amax(3)
    padded = F.pad(any_row, (0, kv_blocks * kv_block - kv_len))
    blocks = padded.view(batch, heads, -1, kv_blocks, kv_block).amax(-1)
    downward = torch.arange(kv_blocks, 0, -1, dtype=torch.int32, device=mask.device)
    listed = torch.where(blocks > 0, downward, 0).topk(kv_blocks, dim=-1).indices.to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32), listed
