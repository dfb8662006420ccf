"""The heads that this process computes, of a model under transformers' tensor parallelism.

Each of N processes (ranks) holds the projections of 1 / N of the query heads and of their key/value heads, in order of
rank. FASA selects for each key/value head alone, so that a decode step needs no communication of its own. Profiles,
budgets and counts describe the whole model: a rank takes its part of every table, and the parts that the ranks measure
are gathered, by this module alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.core.scoring import Scorer
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.model_structure import attention_modules, attention_shape, device_of

_COLWISE = "colwise"
"""Name in transformers' plans of a projection whose outputs, the heads, stay on the rank that computes them."""

_S = TypeVar("_S", bound=Scorer)


@dataclass(frozen=True)
class HeadShard:
    """The heads of one rank: ``query_heads`` and ``kv_heads`` of each layer, from head ``rank * kv_heads`` on.

    Attributes:
        query_heads: query heads of a layer on this rank.
        kv_heads: key/value heads of a layer on this rank.
        rank: number of this rank, from 0.
        ranks: number of ranks that divide the heads; 1: this process computes all heads.
    """

    query_heads: int
    kv_heads: int
    rank: int = 0
    ranks: int = 1
    _group: Any = field(default=None, repr=False, compare=False)
    _device: torch.device = field(default=torch.device("cpu"), repr=False, compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadShard:
        """Find the heads of this process, from the model's mesh and plan; every process computes all without them.

        A plan that gathers the projections' outputs (Phi-3), or that shards experts alone, leaves all heads to every
        rank.

        Raises:
            NotImplementedError: the key/value heads cannot be divided evenly among the ranks, or layers are divided.
        """
        stages = getattr(getattr(model.config, "distributed_config", None), "pp_size", None) or 1
        if stages > 1:
            raise NotSupportedError(
                f"{type(model).__name__} is divided by layers (pp_size={stages}), and a profile and its budgets need "
                "all layers in each process; use tp_size, which divides by heads, or device_map in one process."
            )
        _, query_heads, kv_heads, _ = attention_shape(model)
        mesh, ranks = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None) or 1
        if mesh is None or ranks == 1 or not _divides_heads(model):
            return cls(query_heads, kv_heads)
        if kv_heads % ranks:
            raise NotSupportedError(
                f"{type(model).__name__} has {kv_heads} key/value heads, which tp_size={ranks} cannot divide evenly; "
                "use a tp_size that divides them."
            )
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        place = (mesh.get_local_rank(), ranks, mesh.get_group(), device_of(model))
        return cls(query_heads // ranks, kv_heads // ranks, *place)

    def check(self, query: Tensor, kv_heads: int, where: str) -> None:
        """Refuse attention whose queries are divided among the ranks and whose keys are not, or the other way round.

        Args:
            query: float [B, Hq, Q, D], as the attention function receives it.
            kv_heads: key/value heads that it receives.
            where: the layer and model, for the error.

        Raises:
            NotImplementedError: one of the two numbers of heads is this rank's.
        """
        if self.ranks > 1 and (query.shape[1] == self.query_heads) != (kv_heads == self.kv_heads):
            raise NotSupportedError(
                f"{where} has {query.shape[1]} query heads on {kv_heads} key/value heads on a rank, where tp_size="
                f"{self.ranks} leaves it {self.query_heads} on {self.kv_heads}; shard the projections of queries, keys "
                "and values alike."
            )

    def own(self, table: Tensor, dim: int = 0) -> Tensor:
        """Take this rank's part of a table of all heads, [.., H, ..] with the heads in dimension ``dim``."""
        return table.chunk(self.ranks, dim)[self.rank]

    def whole(self, part: Tensor, dim: int = 0) -> Tensor:
        """Gather the ranks' parts of a table into one of all heads, the inverse of `own`; every rank must call it."""
        if self.ranks == 1:
            return part
        sent = part.to(self._device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, sent, group=self._group)
        return torch.cat(parts, dim).to(part.device)

    def total(self, counts: Tensor) -> Tensor:
        """Sum counts of the ranks' heads, int64 [n], over the ranks; every rank must call it."""
        return self.whole(counts[None]).sum(0)

    def agree(self, fact: bool) -> bool:
        """Whether ``fact`` holds on every rank, such as a file that each looks for; every rank must call it."""
        return bool(self.whole(torch.tensor([int(fact)])).all())

    def scorer(self, scorer: _S) -> _S:
        """Take this rank's part of a scorer that has tables by head; other scorers serve any heads."""
        return scorer if self.ranks == 1 else scorer.shard(self.rank, self.ranks)


def whole_parameter(parameter: Tensor) -> Tensor:
    """Gather a parameter that tensor parallelism or FSDP2 shards (a DTensor); every rank must call it."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _divides_heads(model: PreTrainedModel) -> bool:
    """Whether the model's plan leaves a projection's heads on the rank that computes them."""
    plan = getattr(model, "tp_plan", None) or {}
    layers = set(attention_modules(model).values())
    names = [name for name, module in model.named_modules() if module in layers]
    rules = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    return any(style == _COLWISE and name.rpartition(".")[0] in rules for name, style in plan.items())
