"""SparQ: a few dimensions of every key, those in which the query is large."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.core.budget import check_count
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys, dot_products
from fasa_flex.core.ranking import rank_keys


@dataclass(frozen=True)
class SparQ:
    """SparQ Attention (Ribar et al., 2024): the dot product over the r dimensions of largest ``|q|``.

    As in the paper's code (appendix B), a group's query heads share their dimensions, by the sum of ``|q|`` over them,
    and every head's softmax has the temperature ``sqrt(D * |q_r|_1 / |q|_1)``; it matters where the heads rank as one
    with ``group_reduce="softmax_exact"``, which is the paper's sum. The mean value (section 3, algorithm 1) is
    ``FasaConfig(completion="mean")``: the selected keys' share of the approximate softmax weighs exact attention to
    them, the rest of it the mean of all valid values. The paper's evaluation always takes the latest quarter of the
    budget, ``n_recent=n_fac // 4``. Both are what ``method=sparq`` is evaluated with (`as_published`). The paper keeps
    the keys twice, once by dimension, and a running mean of the values, which cost memory; a step reads r dimensions
    of every key, the selected rows and the mean value, as is counted. Here the mean is taken anew in each step.

    Args:
        r: dimensions; None is ``2 * n_tip``, or a quarter of the head's.
        n_tip: half as many, as FASA counts them.
    """

    r: int | None = None
    n_tip: int | None = None

    estimates_logits = True
    completes_by_all = True

    def __post_init__(self) -> None:
        for name in ("r", "n_tip"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if self.r is not None and self.n_tip is not None:
            raise ValueError(f"r = {self.r} and n_tip = {self.n_tip} say the same thing; give one of them.")

    def __call__(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        batch, query_heads, q_len, head_dim = query.shape
        kv_heads, kv_len = key.shape[1:3]
        grouped = query.reshape(batch, kv_heads, -1, q_len, head_dim).float()
        size = grouped.abs()
        largest = rank_keys(size.sum(2, keepdim=True)).topk(self._dims(head_dim), dim=-1).indices
        chosen = torch.zeros_like(size[:, :, :1]).scatter_(-1, largest, 1.0)
        tiny = torch.finfo(size.dtype).tiny  # a query of zeros scores zeros, not NaN
        share = (size * chosen).sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=tiny)
        cooled = grouped * chosen / share.clamp(min=tiny).sqrt()
        return dot_products(cooled.flatten(2, 3), key).view(batch, kv_heads, query_heads // kv_heads, q_len, kv_len)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """The r dimensions of every key, once for a group."""
        return ReadShare(ranking=self._dims(head_dim) / (2 * head_dim))

    def _dims(self, head_dim: int) -> int:
        if self.n_tip is not None and 2 * self.n_tip > head_dim:
            raise ValueError(f"n_tip must lie in 1..{head_dim // 2}, the chunks of a head, got {self.n_tip}.")
        if self.r is not None and self.r > head_dim:
            raise ValueError(f"r must not exceed the {head_dim} dimensions of a head, got {self.r}.")
        return self.r or 2 * (self.n_tip or 0) or max(1, head_dim // 4)
