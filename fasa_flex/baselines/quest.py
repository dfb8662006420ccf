"""Quest: selects pages of keys by an upper bound of their scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasa_flex.core.budget import check_count
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.scoring import Forward, SequenceScorer


class Quest(SequenceScorer):
    """Quest (Tang et al., 2024): the scores of a page of 16 keys are at most ``sum_d max(q_d * min_d, q_d * max_d)``.

    Minimum and maximum of every dimension are over the page's keys that the query may attend to; pages start at the
    first real token. All tokens of a page get its bound, so whole pages are selected, and the last page in part if the
    budget is no multiple of the page. The page being written competes like any other, as in the published evaluation,
    without that evaluation's minimum of three pages; the published kernels always select it (as
    ``FasaConfig(n_recent=)`` does). The paper keeps the first two layers dense, ``dense_layers=(0, 1)``, and selects
    for every query head, ``group_reduce="none"``. For causal masks with or without padding; stateless.

    Args:
        page: keys of a page.
    """

    stateful = False

    def __init__(self, page: int = 16) -> None:
        check_count("page", page, 1)
        self.page = page

    def follow(self, forward: Forward) -> Tensor:
        """As `SequenceScorer`; float32 [B, Hkv, G, Q - first, T]."""
        query, key, page = forward.query[:, :, forward.first :], forward.key, self.page
        valid = forward.valid[:, 0, 0, forward.first :]
        (batch, query_heads, q_len, dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
        real = valid.any(1)  # [B or 1, T]
        nth = real.cumsum(-1) - 1
        low, high = self._bounds(key, real)
        shape = (batch, kv_heads, query_heads // kv_heads, q_len)
        grouped = query.reshape(*shape, dim).float()
        above, below = grouped.clamp(min=0), grouped.clamp(max=0)
        whole = dot_products(above.flatten(2, 3), high[:, :, page - 1 :: page])
        whole = whole + dot_products(below.flatten(2, 3), low[:, :, page - 1 :: page])
        last = (valid.sum(-1) - 1).clamp(min=0).expand(batch, -1)[:, None]  # [B, 1, Q], each query's last key
        row = last[..., None].expand(-1, kv_heads, -1, dim)
        partial = (above * high.gather(2, row)[:, :, None] + below * low.gather(2, row)[:, :, None]).sum(-1)
        current = (last // page)[:, :, None, :, None].expand(*shape, 1)
        scores = whole.view(*shape, high.shape[2] // page).scatter(-1, current, partial[..., None])
        pages = (nth.clamp(min=0) // page)[:, None, None, None].expand(*shape, kv_len)
        return scores.gather(-1, pages)

    def _bounds(self, key: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Running minimum and maximum within each page of real keys, each float32 [B, Hkv, N * page, D]."""
        batch, kv_heads, kv_len, dim = key.shape
        count = -(-kv_len // self.page)
        order = (~real).to(torch.uint8).argsort(dim=-1, stable=True).expand(batch, -1)
        order = F.pad(order, (0, count * self.page - kv_len))
        keys = key.float().gather(2, order[:, None, :, None].expand(-1, kv_heads, -1, dim))
        pages = keys.unflatten(2, (count, self.page))
        return pages.cummin(3).values.flatten(2, 3), pages.cummax(3).values.flatten(2, 3)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """A minimum and a maximum key of each page, as many bytes as one key and value."""
        return ReadShare(ranking=1 / self.page)
