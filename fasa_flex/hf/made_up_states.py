"""Fixed states in place of a model's linear layers and embeddings, for a forward that needs no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class MadeUpStates(TorchFunctionMode):
    """Mode in which linear layers return fixed states of the right shape and read no weights.

    Args:
        rows: batch rows, each with fixed states of its own, the same for all its tokens; None: linear layers compute.
        casts: whether an operation that refuses mixed float dtypes is repeated with float32 copies of its arguments.
        embeddings: float [rows, P, hidden_size], the embeddings of equal ids [rows, P]. Ids that differ are positions,
            whose table is read.
    """

    def __init__(self, rows: int | None, casts: bool, embeddings: Tensor) -> None:
        super().__init__()
        self._rows, self._casts, self._embeddings = rows, casts, embeddings
        self._patterns: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._rows is not None and func is F.linear and len(args) > 1:
            return self._states(self._rows, *args[:2])
        if func is F.embedding and args[0].shape + args[1].shape[1:] == self._embeddings.shape and _alike(args[0]):
            return self._embeddings
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            widened = tree_map_only(Tensor, _widened, (args, kwargs))
            if not self._casts or func in _WRITES:
                raise
            return func(*widened[0], **widened[1])

    def _states(self, rows: int, states: Tensor, weight: Tensor) -> Tensor:
        key = (weight.shape[0], states.device, states.dtype)
        if key not in self._patterns:
            self._patterns[key] = pattern(*key) if rows == 1 else _patterns(rows, *key)
        fixed = self._patterns[key]
        if rows == 1:
            return fixed.repeat(*states.shape[:-1], 1)
        if states.dim() < 3 or len(states) != rows:
            return fixed[0].repeat(*states.shape[:-1], 1)
        return fixed.view(rows, *[1] * (states.dim() - 2), -1).repeat(1, *states.shape[1:-1], 1)


_WRITES = (Tensor.copy_, Tensor.index_copy_, Tensor.index_add_, Tensor.scatter_, Tensor.__setitem__)
"""Operations that write to an argument; repeated with copies, they would write to a copy."""


def _alike(ids: Tensor) -> bool:
    """Whether all ids are equal; True without data."""
    return ids.is_meta or bool((ids == ids[:1, :1]).all())


def _widened(states: Tensor) -> Tensor:
    return states.float() if states.is_floating_point() else states


def _patterns(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers [rows, width] from a separate generator."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)


def pattern(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers [width] between -1 and 1 that do not vanish under a norm layer."""
    return torch.arange(width, device=device, dtype=torch.float32).cos().to(dtype)
