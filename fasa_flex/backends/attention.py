"""`fasa_attention`: the method as one function of q, k and v, with checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion, CompletionState
from fasa_flex.core.config import Backend, FasaConfig, GroupReduce, check_choice
from fasa_flex.core.method import Call
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.shapes import check_heads
from fasa_flex.core.softmax import Softmax


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

    The function runs eagerly, with the flex backend compiled internally, and under ``torch.compile(fullgraph=True)``.
    For a growing cache torch compiles twice, once for the first length and once for all lengths. With `PackedKeys` it
    compiles once more for a multiple of 16 keys, and once more for a buffer that is full to its last tile.

    If you compile it yourself for a CPU, flex supports one number of queries per graph: mark that dimension static, or
    use "gather" if both lengths change (for two dynamic lengths torch 2.13 generates C++ that does not compile).

    Args:
        q: float [B, Hq, Q, D], post-RoPE; query i sits at slot T - Q + i.
        k: float [B, Hkv, T, D], post-RoPE, without copies for the query heads of a group; Hq is a multiple of Hkv.
        v: float [B, Hkv, T, D].
        chunks: int64 [Hkv or Hq, n_tip, 2], the dimension pairs of each head's dominant chunks.
        n_fac: the budget: number of tokens (int), or share of the query's valid keys (float in (0, 1], rounded up).
        scaling: factor that the softmax multiplies dot products by; None: D ** -0.5.
        n_sink: number of first valid tokens that are always selected, as in `FasaConfig`.
        n_recent: number of last valid tokens that are always selected, as in `FasaConfig`.
        group_reduce: as in `FasaConfig`; always "none" if ``chunks`` has Hq rows and Hq > Hkv.
        key_mask: bool [B, T], True: a real token; None: all tokens are real.
        packed_keys: ``k`` at the dominant dimensions, which scoring reads instead of ``k``: float
            [B, Hkv, T, 2 * n_tip], or for one query per batch row `PackedKeys`, the faster form.
        backend: as in `FasaConfig`, but "fastest" never chooses dense attention; results are equal within rounding.
            "flex" has no gradients, and no ``sinks`` on CPU.
        softcap: c of ``c * tanh(logits / c)``; None: no cap.
        sinks: float [Hq], logits of the model's learned sinks; None: no sinks.
        mean_key: float [Hkv, D], `FasaProfile.mean_key` of the layer, already subtracted in ``packed_keys``; None: 0.
        state: state of all keys and values, for one query per batch row; it completes the result
            (`fasa_flex.core.completion`). None: the unselected keys have weight 0.
        completion_strength: as in `FasaConfig`.

    Returns:
        [B, Hq, Q, D] in the dtype of ``q``; zeros for a query without a valid key. If the budget covers the valid keys,
        this is dense attention.

    Raises:
        ValueError: shapes, dtypes or settings do not fit each other, or queries or keys hold NaN (in eager calls; a
            compiled graph selects NaN keys, so that they show in the result).
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
    call = Call(q, k, v, scorer, valid, budget, group_reduce, softmax, packed_keys, completion=completion)
    return sparse_attention(call, backend)


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
    """Check ``chunks`` and refuse NaN; return the keys with zeros for NaN in padding."""
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
