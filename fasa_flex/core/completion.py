"""Completion: an estimate of the attention output that the unselected keys would have added.

FAC gives every unselected key weight 0. For one query, with the selected keys S, the other valid keys R and estimated
logits s of all keys (TIP's), completed attention is

    share = sum_S exp(s) / (sum_S exp(s) + sum_R exp(s))
    out   = share * FAC + (1 - share) * u,    u = mean(v) + lambda * scaling * q Cov(k, v).

u is the value of the remainder to first order: if keys and values were jointly Gaussian, the mean of v under the
weights exp(scaling * q . k) would be u with lambda = 1. Smaller lambdas allow for the keys that fit the query best
being in S. ``lambda = 0`` is SparQ's mean value (Ribar et al., 2024).

Mean and covariance are those of the *covered* keys: whole blocks of 64 of the row's valid tokens, without the first
four. A query's covered keys depend on its number of valid keys alone, so that decoding, prompts in parts, many queries
at once and padded batches agree. A query with fewer than 64 valid keys covers none and is not completed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.budget import SINKS
from fasa_flex.core.compiler import operator
from fasa_flex.core.group_reduce import Weights
from fasa_flex.core.selection import Selection
from fasa_flex.core.softmax import Softmax, with_sinks

BLOCK = 64
"""Valid tokens that a state is brought up to date by."""


@dataclass(frozen=True, eq=False)
class CompletionState:
    """Sums over the covered keys and values of one cache layer, and what a decode step reads of them.

    Attributes:
        covered: int64 [B, Hkv], valid tokens up to the last covered one, a multiple of 64; 0 covers none.
        key_sum: float32 [B, Hkv, D'], D' = D for a first-order completion and 0 for the mean value alone.
        value_sum: float32 [B, Hkv, Dv].
        product: float32 [B, Hkv, D', Dv], the sum of ``k v^T``.
        mean_value: [B, Hkv, Dv], in the cache's dtype.
        covariance: [B, Hkv, D', Dv], in the cache's dtype.
    """

    covered: Tensor
    key_sum: Tensor
    value_sum: Tensor
    product: Tensor
    mean_value: Tensor
    covariance: Tensor

    @classmethod
    def empty(
        cls, key: Tensor, value: Tensor, first_order: bool, device: torch.device | None = None
    ) -> CompletionState:
        """A state that covers nothing, for keys [B, Hkv, t, D] and values [B, Hkv, t, Dv]; None: on their device."""
        (batch, heads), dim, value_dim = key.shape[:2], key.shape[3] if first_order else 0, value.shape[3]

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, heads, *shape, dtype=dtype, device=device or value.device)

        state = cls(
            covered=zeros(dtype=torch.long),
            key_sum=zeros(dim, dtype=torch.float32),
            value_sum=zeros(value_dim, dtype=torch.float32),
            product=zeros(dim, value_dim, dtype=torch.float32),
            mean_value=zeros(value_dim, dtype=value.dtype),
            covariance=zeros(dim, value_dim, dtype=value.dtype),
        )
        if not torch.compiler.is_compiling():
            for held in state.tensors:
                torch._dynamo.mark_static_address(held)
        return state

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the attributes."""
        return (self.covered, self.key_sum, self.value_sum, self.product, self.mean_value, self.covariance)

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self.tensors)

    def change(self, change: Callable[[Tensor], Tensor]) -> CompletionState:
        """The same change to all tensors: of rows of the batch, or of the device."""
        return CompletionState(*map(change, self.tensors))

    def advance(self, key: Tensor, value: Tensor, valid: Tensor, number: Tensor, written: int) -> None:
        """Cover the blocks that a forward has completed, in place.

        A row whose valid tokens before this forward were fewer than those covered has been cropped or rewound: it is
        covered anew.

        Args:
            key: float [B, Hkv, T, D], the cache's keys after the forward.
            value: float [B, Hkv, T, Dv].
            valid: bool [B or 1, T], the keys that the forward's last query may attend to.
            number: int64 [B or 1, T], how many of them there are up to each slot.
            written: tokens of the forward.
        """
        sums, read = (self.key_sum, self.value_sum, self.product), (self.mean_value, self.covariance)
        cover_blocks(self.covered, *sums, *read, key, value, valid, number, written)


_STATE = ("covered", "key_sum", "value_sum", "product", "mean_value", "covariance")

cover_on: dict[str, Callable[..., None]] = {}
"""Faster ways than `cover_blocks`' own, with its arguments, by device type; a backend puts them here."""


@operator("cover_blocks", lambda *_: None, mutates=_STATE)
def cover_blocks(
    covered: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    product: Tensor,
    mean_value: Tensor,
    covariance: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    number: Tensor,
    written: int,
) -> None:
    """`CompletionState.advance`: by `cover_on` where it can, else row by row."""
    faster = cover_on.get(covered.device.type)
    if faster is not None and _reads(key) and _reads(value):
        state = (covered, key_sum, value_sum, product, mean_value, covariance)
        faster(*state, key, value, valid, number, written, BLOCK, SINKS)
        return
    dim, rows = key_sum.shape[2], len(covered)
    counts = number[:, -1].expand(rows).tolist()
    for row, (done, count) in enumerate(zip(covered[:, 0].tolist(), counts, strict=True)):
        target = count // BLOCK * BLOCK
        if done == target and done <= count - written:
            continue
        if not done or done > count - written:
            done = 0
            for held in (covered, key_sum, value_sum, product):
                held[row] = 0
        if not target:
            continue
        of_row = row if len(number) > 1 else 0
        numbers = number[of_row]
        slots = (valid[of_row] & (numbers > max(done, SINKS)) & (numbers <= target)).nonzero().flatten()
        keys = key[row, :, :, :dim].index_select(1, slots.to(key.device)).to(covered.device).float()
        values = value[row].index_select(1, slots.to(value.device)).to(covered.device).float()
        key_sum[row] += keys.sum(1)
        value_sum[row] += values.sum(1)
        with torch.autocast(covered.device.type, enabled=False):  # the covariance is a difference of large sums
            product[row] += keys.mT @ values
        covered[row] = target
        mean = value_sum[row] / (target - SINKS)
        mean_value[row] = mean
        covariance[row] = (product[row] - key_sum[row][..., None] * mean[:, None]) / (target - SINKS)


def _reads(states: Tensor) -> bool:
    """Whether a kernel on a GPU can read keys or values: there, or in pinned host memory, each row contiguous."""
    return states.stride(3) == 1 and (states.is_cuda or states.is_pinned())


@dataclass(frozen=True, eq=False)
class Completion:
    """How the attention of one layer's call is completed.

    Attributes:
        strength: lambda; 0 for the mean value alone.
        state: that of the cache layer, for one query a row; None: mean and covariance are taken from the keys and
            values themselves, for each query its own.
        by_all: whether these are of all valid keys in place of the covered ones; there is no state then.
    """

    strength: float
    state: CompletionState | None = None
    by_all: bool = False

    def remainder(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """The remainder's value u, and which queries have covered keys.

        Args:
            query: float [B, Hq, Q, D].
            key: float [B, Hkv, T, D].
            value: float [B, Hkv, T, Dv].
            valid: bool [B or 1, 1, 1, Q, T].
            scaling: of the softmax.

        Returns:
            float32 [B, Hkv, G, Q, Dv], and bool that broadcasts to its first four dimensions.
        """
        grouped = query.unflatten(1, (key.shape[1], -1))
        with torch.autocast(query.device.type, enabled=False):
            if self.state is None:
                return _of_keys(grouped, key, value, valid, scaling * self.strength, self.by_all)
            return _of_state(self.state, grouped, scaling * self.strength)


def _of_state(state: CompletionState, query: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """`Completion.remainder` of a state, for queries [B, Hkv, G, 1, D]."""
    value_of = state.mean_value[:, :, None, None].float()
    if factor:  # of the query, since float16 may not hold its product with the covariance
        asked = (query.flatten(2, 3).float() * factor).to(state.covariance.dtype)
        value_of = value_of + (asked @ state.covariance).unflatten(2, query.shape[2:4]).float()
    return value_of, state.covered[:, :, None, None] > 0


def _of_keys(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, factor: float, by_all: bool
) -> tuple[Tensor, Tensor]:
    """`Completion.remainder` without a state: ``u = sum_j (1 + factor (q . k_j - mean(q . k))) v_j / n``, j covered."""
    number = valid.cumsum(-1)
    count = number[..., -1:] if by_all else number[..., -1:] // BLOCK * BLOCK
    first = 0 if by_all else SINKS
    covered = valid & (number > first) & (number <= count)
    weights = covered / (count - first).clamp(min=1)
    if factor:
        scores = torch.where(covered, query.float() @ key.float().mT[:, :, None], 0.0)
        mean = (scores * weights).sum(-1, keepdim=True)
        weights = weights * (1.0 + factor * (scores - mean))
    values = torch.where(covered.any(3).mT, value, 0.0)  # padding may hold anything, which weights of 0 do not undo
    return weights @ values.float()[:, :, None], count[..., 0] > 0


def kept_share(logits: Tensor, weights: Weights, selection: Selection) -> Tensor:
    """The share of all valid keys' mass that the selected ones hold, by estimated logits.

    Args:
        logits: float32 [B, Hkv, G, Q, T].
        weights: theirs.
        selection: of the same queries.

    Returns:
        float32 [B, Hkv, G, Q], in [0, 1]; 1 for a query without a valid key.
    """
    chosen = logits.gather(-1, selection.slots.expand(-1, -1, logits.shape[2], -1, -1))
    kept = torch.where(selection.taken, weights.of(chosen), 0.0).sum(-1)
    share: Tensor = torch.where(weights.total > 0.0, (kept / weights.total).clamp(max=1.0), 1.0)
    return share


def complete(out: Tensor, share: Tensor, remainder: Tensor) -> Tensor:
    """Focused attention ``out`` [B, Hq, Q, Dv], completed by a remainder [B, Hkv, G, Q, Dv] of 1 - share."""
    kept, grouped = share[..., None], out.unflatten(1, share.shape[1:3]).float()
    whole: Tensor = kept * grouped + (1.0 - kept) * remainder
    return whole.flatten(1, 2).to(out.dtype)


def completed(
    out: Tensor,
    lse: Tensor | None,
    share: Tensor | None,
    completion: Completion | None,
    softmax: Softmax,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
) -> Tensor:
    """Attention to the selected keys as the model has it: completed, and with its learned sinks.

    Args:
        out: [B, Hq, Q, Dv], without either.
        lse: float32 [B, Hq, Q], the log-sum-exp of the selected keys' exact logits; needed where there are sinks.
        share: `kept_share`; needed where there is a completion.
        completion: None: there is none.
        softmax: the model's.
        query: of the call, as are ``key``, ``value`` and ``valid`` (`Completion.remainder`).

    Returns:
        [B, Hq, Q, Dv].
    """
    if completion is None:
        share = None
    else:
        assert share is not None
        remainder, known = completion.remainder(query, key, value, valid, softmax.scaling)
        share = torch.where(known, share, 1.0)
        out = complete(out, share, remainder)
    if softmax.sinks is None:
        return out
    assert lse is not None
    return with_sinks(out, lse, share, softmax.sinks)
