"""SparQ: scores every key by the dimensions in which the query is largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_flex.baselines.scorers import group_scores
from fasa_flex.core.budget import check_count
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.ranking import rank_keys
from fasa_flex.core.scoring import Scorer


@dataclass(frozen=True)
class SparQ(Scorer):
    """SparQ Attention (Ribar et al., 2024): the dot product over the r dimensions of largest ``|q|``.

    As in the paper's code (appendix B), a group's query heads share the r dimensions of largest sum of ``|q|``, and
    each head's softmax has the temperature ``sqrt(D * |q_r|_1 / |q|_1)``, which matters if the heads rank together with
    ``group_reduce="softmax_exact"``, the paper's sum. The mean value (section 3, algorithm 1) is
    ``FasaConfig(completion="mean")``: attention to the selected keys is weighted by their share of the approximate
    softmax, the mean of all valid values by the rest. The paper's evaluation always selects the latest quarter of the
    budget, ``n_recent=n_fac // 4``. ``method=sparq`` sets both (`as_published`). The paper stores the keys twice, once
    by dimension, and a running mean of the values; a step reads r dimensions of every key, the selected rows and the
    mean value, which `reads` counts. Here each step computes the mean anew.

    Args:
        r: number of dimensions; None is ``2 * n_tip``, or a quarter of the head's.
        n_tip: half of ``r``, as FASA counts chunks.

    Raises:
        ValueError: ``r`` or ``n_tip`` out of range, or both given.
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

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        grouped = query.unflatten(1, (key.shape[1], -1)).float()
        size = grouped.abs()
        largest = rank_keys(size.sum(2, keepdim=True)).topk(self._dims(query.shape[-1]), dim=-1).indices
        chosen = torch.zeros_like(size[:, :, :1]).scatter_(-1, largest, 1.0)
        tiny = torch.finfo(size.dtype).tiny  # a query of zeros scores zeros, not NaN
        share = (size * chosen).sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=tiny)
        cooled = grouped * chosen / share.clamp(min=tiny).sqrt()
        return group_scores(cooled.flatten(1, 2), key)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """R dimensions of every key, once for a group."""
        return ReadShare(ranking=self._dims(head_dim) / (2 * head_dim))

    def _dims(self, head_dim: int) -> int:
        if self.n_tip is not None and 2 * self.n_tip > head_dim:
            raise ValueError(f"n_tip must lie in 1..{head_dim // 2}, the chunks of a head, got {self.n_tip}.")
        if self.r is not None and self.r > head_dim:
            raise ValueError(f"r must not exceed the {head_dim} dimensions of a head, got {self.r}.")
        return self.r or 2 * (self.n_tip or 0) or max(1, head_dim // 4)
