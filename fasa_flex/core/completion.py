"""Completion: an estimate of the attention output that the unselected keys would have added.

FAC gives every unselected key weight 0. For one query, with the selected keys S, the other valid keys R and the logits
s of all keys as TIP estimates them, completed attention is

    share = sum_S exp(s) / (sum_S exp(s) + sum_R exp(s))
    out   = share * FAC + (1 - share) * u,    u = mean(v) + lambda * scaling * q Cov(k, v).

u is a first-order estimate of the remainder's value: if keys and values were jointly Gaussian, the mean of v under the
weights exp(scaling * q . k) would be u with lambda = 1. A smaller lambda corrects for S, which holds the keys with the
largest logits. ``lambda = 0`` is SparQ's mean value (Ribar et al., 2024).

Mean and covariance are taken over the *covered* keys: complete blocks of 64 valid tokens of the row, without the first
four tokens. The covered keys of a query depend on its number of valid keys alone, so that decoding, chunked prompts,
forwards of many queries and padded batches agree. A query with fewer than 64 valid keys is not completed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.budget import SINKS
from fasa_flex.core.compiler import operator
from fasa_flex.core.group_reduce import MOST, Weights
from fasa_flex.core.pieces import rows_that_fit
from fasa_flex.core.selection import Selection
from fasa_flex.core.softmax import Softmax, with_sinks

BLOCK = 64
"""Number of valid tokens in one block of covered keys."""

MOST_BY_KERNEL = 1024
"""Most tokens of a forward that the kernel in `cover_on` covers."""


@dataclass(frozen=True, eq=False)
class CompletionState:
    """Sums over the covered keys and values of one cache layer, and the mean and covariance for a decode step.

    Attributes:
        covered: int64 [B, Hkv], number of valid tokens up to the last covered one, a multiple of 64; 0: none.
        key_sum: float32 [B, Hkv, D'], D' = D for a first-order completion and 0 for the mean value alone.
        value_sum: float32 [B, Hkv, Dv].
        product: float32 [B, Hkv, D', Dv], the sum of ``k v^T``.
        mean_value: [B, Hkv, Dv], in the dtype of the cache.
        covariance: [B, Hkv, D', Dv], in the dtype of the cache.
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
        """Make a state that covers no keys, for a cache of keys [B, Hkv, t, D] and values [B, Hkv, t, Dv].

        ``first_order`` adds the covariance. The state is on ``device``; None: on the device of ``value``.
        """
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
            for tensor in state.tensors:
                torch._dynamo.mark_static_address(tensor)
        return state

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the attributes."""
        return (self.covered, self.key_sum, self.value_sum, self.product, self.mean_value, self.covariance)

    @property
    def n_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def change(self, change: Callable[[Tensor], Tensor]) -> CompletionState:
        """Apply ``change`` to every tensor, such as a selection of batch rows or a move to another device."""
        return CompletionState(*map(change, self.tensors))

    def advance(self, key: Tensor, value: Tensor, valid: Tensor, number: Tensor, written: int) -> None:
        """Add the blocks of keys that this forward filled, in place.

        If a row had fewer valid tokens before this forward than are covered, its cache was cropped or rewound: its sums
        are computed again from the first token.

        Args:
            key: float [B, Hkv, T, D], the cache's keys after the forward.
            value: float [B, Hkv, T, Dv].
            valid: bool [B or 1, T], the keys that the forward's last query may attend to.
            number: int64 [B or 1, T], number of valid keys up to and including each slot.
            written: number of tokens that the forward wrote.
        """
        sums, read = (self.key_sum, self.value_sum, self.product), (self.mean_value, self.covariance)
        cover_blocks(self.covered, *sums, *read, key, value, valid, number, written)


_STATE = ("covered", "key_sum", "value_sum", "product", "mean_value", "covariance")

cover_on: dict[str, Callable[..., None]] = {}
"""Kernels that replace `cover_blocks`, by device type; a backend registers them."""


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
    """Compute `CompletionState.advance` with the kernel in `cover_on` if it can read the cache, else row by row.

    A prompt on the device goes row by row, too: the kernel has one program for each head, matrix products use all of
    the GPU.
    """
    faster = cover_on.get(covered.device.type)
    long = written > MOST_BY_KERNEL and key.device == covered.device
    if faster is not None and not long and _reads(key) and _reads(value):
        state = (covered, key_sum, value_sum, product, mean_value, covariance)
        faster(*state, key, value, valid, number, written, BLOCK, SINKS)
        return
    dim, counts = key_sum.shape[2], number[:, -1].expand(len(covered)).tolist()
    for row, (done, count) in enumerate(zip(covered[:, 0].tolist(), counts, strict=True)):
        target = count // BLOCK * BLOCK
        if done == target and done <= count - written:
            continue
        if not done or done > count - written:
            done = 0
            for total in (covered, key_sum, value_sum, product):
                total[row] = 0
        if not target:
            continue
        real, numbers = (each[row if len(number) > 1 else 0] for each in (valid, number))
        slots = (real & (numbers > max(done, SINKS)) & (numbers <= target)).nonzero().flatten()
        for piece in slots.split(rows_that_fit(4 * key_sum[row].numel() + 4 * value_sum[row].numel())):
            keys = key[row, :, :, :dim].index_select(1, piece.to(key.device)).to(covered.device).float()
            values = value[row].index_select(1, piece.to(value.device)).to(covered.device).float()
            key_sum[row] += keys.sum(1)
            value_sum[row] += values.sum(1)
            with torch.autocast(covered.device.type, enabled=False):  # the covariance is a difference of large sums
                product[row] += keys.mT @ values
        covered[row] = target
        mean = value_sum[row] / (target - SINKS)
        mean_value[row] = mean
        covariance[row] = (product[row] - key_sum[row][..., None] * mean[:, None]) / (target - SINKS)


def _reads(states: Tensor) -> bool:
    """Whether a GPU kernel can read keys or values: on the GPU or in pinned host memory, with contiguous rows."""
    return states.stride(3) == 1 and (states.is_cuda or states.is_pinned())


@dataclass(frozen=True, eq=False)
class Completion:
    """How one attention call estimates the contribution of the unselected keys.

    Attributes:
        strength: lambda, the factor of the first-order term; 0: the mean value alone.
        state: state of the cache layer, for one query per batch row; None: mean and covariance are computed from the
            keys and values, for each query separately.
        by_all: whether they are computed over all valid keys instead of the covered ones; requires ``state`` None.
    """

    strength: float
    state: CompletionState | None = None
    by_all: bool = False

    def remainder(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the remainder's value u, and which queries have covered keys.

        Args:
            query: float [B, Hq, Q, D].
            key: float [B, Hkv, T, D].
            value: float [B, Hkv, T, Dv].
            valid: bool [B or 1, 1, 1, Q, T].
            scaling: factor that the softmax multiplies dot products by.

        Returns:
            u, float32 [B, Hkv, G, Q, Dv], and a bool mask that broadcasts to [B, Hkv, G, Q].
        """
        grouped = query.unflatten(1, (key.shape[1], -1))
        with torch.autocast(query.device.type, enabled=False):
            if self.state is None:
                return _of_keys(grouped, key, value, valid, scaling * self.strength, self.by_all)
            return _of_state(self.state, grouped, scaling * self.strength)


def _of_state(state: CompletionState, query: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Compute `Completion.remainder` from a state, for queries [B, Hkv, G, 1, D]."""
    remainder = state.mean_value[:, :, None, None].float()
    if factor:  # scales the query, since query @ covariance may overflow in float16
        scaled = (query.flatten(2, 3).float() * factor).to(state.covariance.dtype)
        remainder = remainder + (scaled @ state.covariance).unflatten(2, query.shape[2:4]).float()
    return remainder, state.covered[:, :, None, None] > 0


def _of_keys(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, factor: float, by_all: bool
) -> tuple[Tensor, Tensor]:
    """Compute `Completion.remainder` of n covered keys: ``u = sum_j (1 + factor (q . k_j - mean(q . k))) v_j / n``."""
    number = valid.cumsum(-1)
    count = number[..., -1:] if by_all else number[..., -1:] // BLOCK * BLOCK
    first = 0 if by_all else SINKS
    covered = valid & (number > first) & (number <= count)
    weights = covered / (count - first).clamp(min=1)
    if factor:
        scores = torch.where(covered, query.float() @ key.float().mT[:, :, None], 0.0)
        mean = (scores * weights).sum(-1, keepdim=True)
        weights = weights * (1.0 + factor * (scores - mean))
    values = torch.where(covered.any(3).mT, value, 0.0)  # padding may hold NaN, and 0 * NaN is NaN
    return weights @ values.float()[:, :, None], count[..., 0] > 0


def kept_share(logits: Tensor, weights: Weights, selection: Selection) -> Tensor:
    """Estimate the share of the valid keys' attention mass that lies on the selected keys.

    Args:
        logits: float32 [B, Hkv, G, Q, T], estimated logits.
        weights: attention weights of these logits (`fasa_flex.core.group_reduce.weigh`).
        selection: selected keys of the same queries.

    Returns:
        float32 [B, Hkv, G, Q], in [0, 1]; 1 for a query without a valid key.
    """
    chosen = logits.gather(-1, selection.slots.expand(-1, -1, logits.shape[2], -1, -1))
    kept = torch.where(selection.taken, (chosen - weights.unit).clamp(max=MOST).exp(), 0.0).sum(-1)
    share: Tensor = torch.where(weights.total > 0.0, (kept / weights.total).clamp(max=1.0), 1.0)
    return share


def complete(out: Tensor, share: Tensor, remainder: Tensor) -> Tensor:
    """Mix ``out`` [B, Hq, Q, Dv] of the selected keys with the remainder [B, Hkv, G, Q, Dv]: share to 1 - share."""
    kept, grouped = share[..., None], out.unflatten(1, share.shape[1:3]).float()
    mixed: Tensor = kept * grouped + (1.0 - kept) * remainder
    return mixed.flatten(1, 2).to(out.dtype)


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
    """Add the completion and the model's learned sinks to the attention of the selected keys.

    Args:
        out: [B, Hq, Q, Dv], exact attention to the selected keys alone.
        lse: float32 [B, Hq, Q], the log-sum-exp of the selected keys' exact logits; required with learned sinks.
        share: result of `kept_share`; required with a completion.
        completion: how to estimate the unselected keys; None: they have weight 0.
        softmax: scaling, logit cap and learned sinks of the model's attention.
        query: argument of `Completion.remainder`, as are ``key``, ``value`` and ``valid``.

    Returns:
        [B, Hq, Q, Dv].
    """
    if completion is None:
        share = None
    else:
        assert share is not None
        remainder, covers = completion.remainder(query, key, value, valid, softmax.scaling)
        share = torch.where(covers, share, 1.0)
        out = complete(out, share, remainder)
    if softmax.sinks is None:
        return out
    assert lse is not None
    return with_sinks(out, lse, share, softmax.sinks)
