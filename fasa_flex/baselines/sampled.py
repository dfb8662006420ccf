"""vAttention: the best keys, and a random sample that stands for all other keys; an alternative to completion."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasa_flex.backends.gather import gather_focused
from fasa_flex.core.adapted_scorers import as_scorer
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.ranking import INVALID, is_first
from fasa_flex.core.scoring import Scorer
from fasa_flex.core.selection import Selection
from fasa_flex.core.softmax import Softmax


@dataclass(frozen=True)
class Sampled(Scorer):
    """vAttention (Desai et al., 2025, arXiv 2510.05688): the best keys, and a random sample of the others.

    One part of the budget, which includes forced tokens, is the best keys; the rest is drawn uniformly, without
    replacement, from the remainder R of the valid keys. The sample's exact logits enter the softmax plus log(|R| / m)
    for m drawn keys, so that numerator and denominator of attention are unbiased. Differences: the paper chooses m for
    each head and query by an error bound, here it is a share of the budget. (MagicPIG, Chen et al., 2025, arXiv
    2410.16179, draws by hashing, near keys more often.) A draw depends on the seed, the head and the positions of query
    and key among valid tokens only, so that decoding and one forward of many queries draw the same keys.

    Attention gathers rows, whatever the backend is.

    Args:
        ranker: ranks the keys.
        share: share of the budget that is drawn at random, in [0, 1).
        seed: seed of the draws; each layer needs another one.
        rank: number of the rank of a tensor-parallel model, so that its heads draw their own keys (`shard`).

    Raises:
        ValueError: ``share`` out of range.
    """

    ranker: Scorer
    share: float = 0.5
    seed: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"share of the budget that is drawn at random must lie in [0, 1), got {self.share}.")
        object.__setattr__(self, "ranker", as_scorer(self.ranker))

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`: the ranker's scores."""
        return self.ranker(query, key, packed_keys)

    def shard(self, rank: int, ranks: int) -> Sampled:
        """As `Scorer`: the part of one rank."""
        return replace(self, ranker=self.ranker.shard(rank, ranks), rank=rank)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Selection, softmax: Softmax
    ) -> tuple[Tensor, Tensor | None]:
        """As `fasa_flex.backends.gather.gather_focused`, with the sample in place of the selection's last keys."""
        order, valid = selection.order, selection.order > INVALID
        best = order.gather(-1, selection.slots).masked_fill(~selection.taken, INVALID).sort(-1, descending=True)
        slots, count = selection.slots.gather(-1, best.indices), selection.count[..., None]
        drawn = (count * self.share).long()
        kept = torch.maximum(count - drawn, (is_first(order) & valid).sum(-1, keepdim=True))
        least = best.values.gather(-1, (kept - 1).clamp(min=0))
        remainder = valid & (order < least)
        most = max(1, min(int(slots.shape[-1] * self.share), order.shape[-1]))
        lots = torch.where(remainder, self._lots(valid), -1).topk(most, dim=-1)
        taken = (lots.values >= 0) & (torch.arange(most, device=order.device) < count - kept)
        weight = remainder.sum(-1, keepdim=True) / taken.sum(-1, keepdim=True).clamp(min=1)
        zeros = torch.zeros_like(best.values, dtype=torch.float32)
        log_weights = torch.cat([zeros, weight.clamp(min=1).log().expand(lots.values.shape)], dim=-1)
        column = torch.arange(slots.shape[-1], device=order.device)
        both = Selection(
            torch.cat([slots, lots.indices], dim=-1), torch.cat([column < kept, taken], dim=-1), selection.order
        )
        return gather_focused(query, key, value, both, softmax, log_weights)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare | None:
        """The ranker's; drawn keys and values are part of the budget."""
        return self.ranker.reads(head_dim, query_heads, kv_heads)

    def reads_packed(self, head_dim: int, dtype: torch.dtype) -> float | None:
        """As `Scorer`: the ranker's."""
        return self.ranker.reads_packed(head_dim, dtype)

    def _lots(self, valid: Tensor) -> Tensor:
        """Random numbers by a hash (splitmix64) for every query and key: int64 [B, H, G, Q, T], at least 0."""
        number, count = valid.cumsum(-1), valid.shape[1] * valid.shape[2]
        heads = self.rank * count + torch.arange(count, device=valid.device)
        own = (self.seed * 1_000_003 + heads.view(valid.shape[1:3])) * 0x2545F4914F6CDD1D
        mixed = _mix(own[:, :, None, None] + number[..., -1:])
        return _mix(mixed + number * 0x1E3779B97F4A7C15) & ((1 << 62) - 1)


def _mix(number: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64; products wrap."""
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        number = (number ^ ((number >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return number ^ ((number >> 31) & ((1 << 33) - 1))
