"""Focused attention: exact attention over the selected keys (the paper's FAC), and the whole method at once."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from fasa_flex.budget import Budget
from fasa_flex.compiling import Step, beyond_the_limit, padded_to_power_of_two, situation
from fasa_flex.completion import Completion, CompletionState, completed, kept_share
from fasa_flex.config import Backend, FasaConfig, GroupReduce, check_choice
from fasa_flex.fused import decode_by_kernels, why_no_kernels
from fasa_flex.held_rows import HeldRows
from fasa_flex.masks import kv_block_size, to_block_mask
from fasa_flex.packing import PackedKeys
from fasa_flex.realize import realize
from fasa_flex.reference import reference_attention
from fasa_flex.rows import dot_rows, take_rows, weigh_rows, whole_buffer
from fasa_flex.scoring import DominantChunks, Scorer, check_scores, reduce_group, weigh
from fasa_flex.selection import Marks, Selection, select, valid_keys
from fasa_flex.shapes import check_heads
from fasa_flex.softmax import Softmax


def fasa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Tensor,
    n_fac: int | float = 256,
    scaling: float | None = None,
    n_sink: int | None = None,
    n_recent: int | None = None,
    group_reduce: GroupReduce = "softmax",
    key_mask: Tensor | None = None,
    packed_keys: PackedKeys | Tensor | None = None,
    backend: Backend = "flex",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mean_key: Tensor | None = None,
    state: CompletionState | None = None,
    completion_strength: float = FasaConfig.completion_strength,
) -> Tensor:
    """Frequency-aware sparse attention: score all keys with the dominant chunks, attend to the best (TIP, then FAC).

    Runs eagerly, where the flex backend compiles itself, and under ``torch.compile(fullgraph=True)``; a growing cache
    is compiled twice in all, once for its first length and once for any length. With `PackedKeys` a multiple of 16 keys
    and a buffer that is full to its last tile are compiled anew, too, each once.

    Under a compiler of one's own on a CPU, flex takes one number of queries a graph: mark their dimension static, or
    use "gather", where both lengths change (torch 2.13 makes code of it that does not compile).

    Args:
        q: float [B, Hq, Q, D], post-RoPE; query i sits at slot T - Q + i.
        k: float [B, Hkv, T, D], post-RoPE; Hq a multiple of Hkv. Not repeated over the group.
        v: float [B, Hkv, T, D].
        chunks: int64 [Hkv or Hq, n_tip, 2], the dimension pairs of each head's dominant chunks.
        n_fac: the budget: tokens (int), or a share of the query's valid keys (float in (0, 1], rounded up).
        scaling: softmax scale; None is D ** -0.5.
        n_sink: first valid tokens that are always selected, inside the budget; None: as in `FasaConfig`.
        n_recent: last valid tokens that are always selected, inside the budget; None: as in `FasaConfig`.
        group_reduce: as in `FasaConfig`; always "none" where ``chunks`` has Hq rows and Hq > Hkv.
        key_mask: bool [B, T], True = real token; None: all real.
        packed_keys: ``k`` at the dominant dimensions, read for the scores instead of ``k``: float
            [B, Hkv, T, 2 * n_tip], or `PackedKeys` for one query a row, the faster form.
        backend: as in `FasaConfig`, here always sparse; equal within rounding. "flex" has no gradients, and
            no ``sinks`` on CPU.
        softcap: cap of the model's logits, None: none.
        sinks: float [Hq], the model's learned sinks, None: none.
        mean_key: float [Hkv, D], `FasaProfile.mean_key` of the layer, which ``packed_keys`` are less of; None: 0.
        state: of the keys and values, for one query a row: then the result is completed (`fasa_flex.completion`);
            None: it is not.
        completion_strength: as in `FasaConfig`.

    Returns:
        [B, Hq, Q, D] in the dtype of ``q``; zeros for a query with no valid key. With a budget of at least the valid
        keys this is dense attention.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit; NaN in queries or keys (eager calls only: a compiled
            graph selects NaN keys, so that they show in the result).
    """
    check_heads(q, k)
    _check_call(q, k, v, chunks, key_mask, packed_keys)
    _check_completion(q, k, v, chunks, mean_key, state)
    budget = Budget.stated(n_fac, n_sink, n_recent)
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must be one number for each of {q.shape[1]} query heads, got {tuple(sinks.shape)}.")
    check_choice("group_reduce", group_reduce, GroupReduce)
    check_choice("backend", backend, Backend)
    if not torch.compiler.is_compiling():
        k = _checked_keys(q, k, chunks, key_mask)
    if chunks.shape[0] != k.shape[1]:
        group_reduce = "none"
    valid = valid_keys(q.shape[2], k.shape[2], key_mask, q.device)
    scorer = DominantChunks(chunks.flatten(1), mean_key)
    softmax = Softmax(q.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks)
    completion = None if state is None else Completion(completion_strength, state)
    return sparse_attention(
        q, k, v, scorer, valid, budget, group_reduce, softmax, backend, packed_keys, completion=completion
    )


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scorer: Scorer,
    valid: Tensor,
    budget: Budget,
    group_reduce: GroupReduce,
    softmax: Softmax,
    backend: Backend,
    packed_keys: PackedKeys | Tensor | None = None,
    held: HeldRows | None = None,
    marks: Marks | None = None,
    completion: Completion | None = None,
) -> Tensor:
    """`fasa_attention` for any scorer and any validity [B or 1, 1, 1, Q, T], without the checks.

    ``held`` are the rows that the device holds of keys and values in host memory (FASA-M), ``marks`` those of the valid
    keys, where they are known.
    """
    if marks is None:
        marks = Marks.of(valid, budget, samples=group_reduce == "softmax" or completion is not None)
    if backend in ("auto", "fastest", "triton"):
        obstacle = why_no_kernels(query, key, value, scorer, budget, group_reduce, packed_keys)
        if obstacle is None:
            assert isinstance(scorer, DominantChunks)
            assert isinstance(packed_keys, PackedKeys)
            return decode_by_kernels(
                query, key, value, scorer, valid, budget, group_reduce, softmax, packed_keys, held, marks, completion
            )
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot serve this call: {obstacle}; use backend='auto'.")
        compiles = backend == "fastest" and key.device == query.device
        # flex has no kernel for blocks of 16 keys in float32 (torch 2.11, CUDA)
        backend = "flex" if query.is_cuda and not compiles and query.dtype != torch.float32 else "gather"
    else:
        compiles = False
    if key.device != query.device or hasattr(scorer, "attend"):  # FASA-M: only the selected rows leave the host
        backend = "gather"
    if backend == "flex":
        _check_flex(query, key, value, softmax)
        compiles = True  # uncompiled, flex_attention ignores block lists and computes every score
        if query.device.type == "cpu" and isinstance(packed_keys, PackedKeys):
            packed_keys = None  # with the tiles of a growing cache Inductor's C++ does not compile (torch 2.13)
    step = _score_select_attend
    if compiles and not torch.compiler.is_compiling():
        if isinstance(packed_keys, PackedKeys):
            key, value, valid, marks = _with_room(key, value, valid, marks, packed_keys)
        q_len = query.shape[2]
        if backend == "flex" and query.device.type == "cpu" and q_len > 1:
            # torch's C++ of two lengths that vary does not compile (2.13): a graph has one number of queries
            query, valid, marks, scorer = padded_to_power_of_two(query, valid, marks, scorer)
            queries = query.shape[2]
        else:
            queries = min(q_len, 2)
        batch, query_heads, _, head_dim = query.shape
        shape = (batch, query_heads, key.shape[1], head_dim, queries, query.dtype, query.device.type)
        kind = situation(query, key, value, scorer, valid, softmax.sinks, packed_keys, marks, completion)
        step = _compiled(*shape, *kind, budget, group_reduce, softmax.scaling, softmax.softcap, backend)
        rest = (budget, group_reduce, softmax, backend, packed_keys, marks, completion)
        return step(query, key, value, scorer, valid, *rest)[:, :, :q_len]
    return step(
        query, key, value, scorer, valid, budget, group_reduce, softmax, backend, packed_keys, marks, completion
    )


def _with_room(
    key: Tensor, value: Tensor, valid: Tensor, marks: Marks, packed: PackedKeys
) -> tuple[Tensor, Tensor, Tensor, Marks]:
    """A growing cache's whole buffers, whose free slots are not valid: of one length until they are full."""
    keys, values = whole_buffer(key), whole_buffer(value)
    if not keys.shape[2] == values.shape[2] <= packed.capacity:
        return key, value, valid, marks
    free = keys.shape[2] - key.shape[2]
    return keys, values, F.pad(valid, (0, free)), marks.with_room(key.shape[2], free)


def _check_flex(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> None:
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(
            "backend 'flex' computes no gradients; wrap the call in torch.no_grad(), or use backend='gather'."
        )
    if query.device.type == "cpu" and softmax.sinks is not None:
        raise ValueError("backend 'flex' has no learned sinks on CPU; use backend='gather'.")


def _score_select_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scorer: Scorer,
    valid: Tensor,
    budget: Budget,
    group_reduce: GroupReduce,
    softmax: Softmax,
    backend: Backend,
    packed_keys: PackedKeys | Tensor | None,
    marks: Marks,
    completion: Completion | None,
) -> Tensor:
    scores = scorer(query, key, packed_keys)
    if not isinstance(scorer, DominantChunks):
        check_scores(scores, query, key)
    logits = weights = None
    if completion is not None and backend != "reference":
        assert marks.sample is not None
        logits = softmax.logits(scores)
        weights = weigh(logits, valid, marks.sample)
    if weights is None or group_reduce != "softmax" or scores.shape[2] == 1:
        ranking = reduce_group(scores, valid, group_reduce, softmax, marks.sample)
    else:
        ranking = weights.ranking
    if backend == "reference":
        return reference_attention(query, key, value, ranking, valid, budget, softmax, scores, completion)
    selection = select(ranking, valid, budget, marks.forced)
    attend = getattr(scorer, "attend", None) or (flex_focused if backend == "flex" else gather_focused)
    out, lse = attend(query, key, value, selection, softmax)
    share = None
    if logits is not None and weights is not None:
        share = kept_share(logits, weights, selection)
    return completed(out, lse, share, completion, softmax, query, key, value, valid)


@functools.cache
def _compiled(*signature: object) -> Callable[..., Tensor]:
    """The compiled step of one static signature.

    Dynamo allows a code object a few specialisations (8) and turns sizes that differ between functions of one name
    into a symbol, which flex's decode kernel refuses for batch and heads. So each signature compiles a function of its
    own, in which only lengths vary, and where that is not enough, as of scorers that differ by layer, one more.
    """
    step = _score_select_attend

    def compile_another(number: int) -> Step:
        name = f"{step.__name__}_{hashlib.sha256(repr((signature, number)).encode()).hexdigest()[:8]}"
        own = types.FunctionType(step.__code__.replace(co_name=name), step.__globals__, name)
        return torch.compile(own, fullgraph=True)

    return beyond_the_limit(compile_another)


def flex_focused(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """`flex_attention` over the selection's block mask; the group's query heads are folded into its rows.

    To be compiled: eager `flex_attention` ignores the block list and computes every score.

    Returns:
        [B, Hq, Q, Dv], without learned sinks, and for a model that has them the log-sum-exp of the logits, float32
        [B, Hq, Q].
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


def gather_focused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    softmax: Softmax,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the selected rows of K and V, fetched into a dense buffer [.., K, D]; on CPU those of K alone.

    Args:
        log_weights: float32 [B, H, G, Q, K], how many keys each selected one stands for, as a logarithm; None: itself.

    Returns:
        as `flex_focused`.
    """
    batch, query_heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    slots = selection.slots
    shared, width = slots.shape[2], slots.shape[4]
    members = query_heads // kv_heads // shared
    rows = take_rows(key, slots)
    grouped = query.view(batch, kv_heads, shared, members, q_len, head_dim).transpose(3, 4)
    grouped = grouped.reshape(batch, -1, members, head_dim)
    some = selection.taken.any(-1, keepdim=True)
    # a query without a key attends to anything, and is set to zero below: a softmax over nothing has NaN gradients
    taken = (selection.taken | ~some).reshape(batch, -1, 1, width)
    weigh_by = None if log_weights is None else log_weights.reshape(batch, -1, 1, width)
    lse = None
    if softmax.plain and query.device.type != "cpu":
        values = take_rows(value, slots)
        mask = taken if weigh_by is None else torch.where(taken, weigh_by.to(query.dtype), -torch.inf)
        out = F.scaled_dot_product_attention(grouped, rows, values, attn_mask=mask, scale=softmax.scaling)
    else:
        logits = softmax.cap(dot_rows(grouped, rows) * softmax.scaling)
        logits = (logits if weigh_by is None else logits + weigh_by).masked_fill(~taken, -torch.inf)
        out = weigh_rows(logits.softmax(-1).to(value.dtype), value, slots)
        if softmax.sinks is not None:
            by_member = logits.logsumexp(-1).view(batch, kv_heads, shared, q_len, members).transpose(3, 4)
            lse = torch.where(some[..., None, :, 0], by_member, -torch.inf).reshape(batch, query_heads, q_len)
    out = out.view(batch, kv_heads, shared, q_len, members, -1).transpose(3, 4)
    return torch.where(some[:, :, :, None], out, 0.0).reshape(batch, query_heads, q_len, -1), lse


def _check_call(
    q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, key_mask: Tensor | None, packed_keys: PackedKeys | Tensor | None
) -> None:
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} does not fit k {tuple(k.shape)}; expected [B, Hkv, T, D].")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    heads = (k.shape[1], q.shape[1])
    if (
        chunks.dtype != torch.long
        or chunks.dim() != 3
        or chunks.shape[2] != 2
        or chunks.shape[0] not in heads
        or not 0 < chunks.shape[1] * 2 <= q.shape[3]
    ):
        raise ValueError(
            f"chunks must be [{heads[0]} or {heads[1]} heads, 1..{q.shape[3] // 2} chunks, 2 dimensions], "
            f"int64, got {chunks.dtype} {tuple(chunks.shape)}; FasaProfile.dominant_dims gives a layer's."
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"key_mask must be bool {(k.shape[0], k.shape[2])}, got {key_mask.dtype} {tuple(key_mask.shape)}; "
            "True is a real token."
        )
    if packed_keys is not None:
        expected = (*k.shape[:3], 2 * chunks.shape[1])
        if isinstance(packed_keys, PackedKeys):
            batch, kv_heads = packed_keys.tiles.shape[:2]
            got: tuple[int, ...] = (batch, kv_heads, min(packed_keys.capacity, k.shape[2]), packed_keys.width)
            if q.shape[2] != 1:
                raise ValueError(
                    f"PackedKeys score one query a row, got {q.shape[2]}; pass DominantChunks.pack(k), or nothing."
                )
        else:
            got = tuple(packed_keys.shape)
        if got != expected or chunks.shape[0] != k.shape[1]:
            raise ValueError(
                f"packed_keys must be {expected} with one chunk set per key/value head, got {got} "
                f"and {chunks.shape[0]} sets; pack with DominantChunks.pack."
            )


def _check_completion(
    q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, mean_key: Tensor | None, state: CompletionState | None
) -> None:
    batch, kv_heads, _, head_dim = k.shape
    if mean_key is not None and (tuple(mean_key.shape) != (kv_heads, head_dim) or chunks.shape[0] != kv_heads):
        raise ValueError(
            f"mean_key must be {(kv_heads, head_dim)} with one chunk set per key/value head, got "
            f"{tuple(mean_key.shape)} and {chunks.shape[0]} sets; pass FasaProfile.mean_key of the layer, or None."
        )
    if state is None:
        return
    if q.shape[2] != 1:
        raise ValueError(f"state completes one query a row, got {q.shape[2]}; pass one query, or state=None.")
    got, expected = tuple(state.mean_value.shape), (batch, kv_heads, v.shape[3])
    if got != expected or state.key_sum.shape[2] not in (0, head_dim):
        raise ValueError(
            f"state is of values {got} and keys of {state.key_sum.shape[2]} dimensions, expected {expected} and "
            f"{head_dim}; make it with CompletionState.empty(k, v, first_order=True) and advance it."
        )


def _checked_keys(q: Tensor, k: Tensor, chunks: Tensor, key_mask: Tensor | None) -> Tensor:
    """The keys, with zeros in place of NaN that ``key_mask`` leaves out."""
    if k.isnan().any() and key_mask is not None:
        k = torch.where(key_mask[:, None, :, None], k, 0)
    if q.isnan().any() or k.isnan().any():
        raise ValueError("q or k holds NaN; find what produced it before attending, padding belongs in key_mask.")
    if chunks.min() < 0 or chunks.max() >= q.shape[3]:
        raise ValueError(
            f"chunks name dimensions {int(chunks.min())}..{int(chunks.max())} of heads with {q.shape[3]}; "
            "pass the chunks of this model's own layout."
        )
    return k
