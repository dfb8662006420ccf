"""Calls of completed attention: with a cache's state for one query, and without one for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion, CompletionState
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax


def state_of(
    k: Tensor, v: Tensor, key_mask: Tensor | None = None, first_order: bool = True, steps: tuple[int, ...] = ()
) -> CompletionState:
    """Of keys and values [B, Hkv, T, D], written by forwards of so many tokens, or by one."""
    state, end = CompletionState.empty(k, v, first_order), 0
    for tokens in steps or (k.shape[2],):
        end += tokens
        valid = (torch.ones(1, end, dtype=torch.bool) if key_mask is None else key_mask[:, :end]).to(k.device)
        state.advance(k[:, :, :end], v[:, :, :end], valid, valid.cumsum(-1), tokens)
    assert end == k.shape[2]
    return state


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Tensor,
    strength: float = 0.75,
    key_mask: Tensor | None = None,
    backend: Any = "gather",
    group_reduce: Any = "max",
    n_fac: float = 16,
    softmax: Softmax | None = None,
    mean_key: Tensor | None = None,
    forced: tuple[int | None, int | None] = (0, 0),
    state: CompletionState | None = None,
) -> Tensor:
    """Completed attention of every query, each by its own covered keys unless there is a state."""
    valid = valid_keys(q.shape[2], k.shape[2], key_mask, q.device)
    call = Call(
        q,
        k,
        v,
        DominantChunks(chunks.flatten(1), mean_key),
        valid,
        Budget(n_fac, *forced),
        group_reduce if len(chunks) == k.shape[1] else "none",
        Softmax(q.shape[-1] ** -0.5) if softmax is None else softmax,
        completion=Completion(strength, state),
    )
    return sparse_attention(call, backend)
