"""What a compiled step is compiled for, so that Dynamo is not asked for more than it gives one function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional as F

from fasa_flex.completion import Completion
from fasa_flex.packing import PackedKeys
from fasa_flex.scoring import Given, Scorer
from fasa_flex.selection import Marks

Step = Callable[..., Tensor]


def situation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scorer: Scorer,
    valid: Tensor,
    sinks: Tensor | None,
    packed: PackedKeys | Tensor | None,
    marks: Marks,
    completion: Completion | None,
) -> tuple[Hashable, ...]:
    """What a graph is specialised for beside the sizes: modes, layouts, and which arguments there are.

    Arguments are those of `fasa_flex.attention.sparse_attention`.
    """
    precision = (packed.tiles.dtype, packed.scales is None) if isinstance(packed, PackedKeys) else None
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(query.device.type),
        *(_layout(states) for states in (query, key, value)),
        value.shape[3],
        valid.shape[0],
        type(scorer).__qualname__,
        *(_shape(getattr(scorer, name, None)) for name in ("dims", "mean_key", "weights")),
        getattr(scorer, "dtype", None),
        *map(_shape, marks),
        None if completion is None else (completion.strength, completion.state is None),
        sinks is None,
        type(packed).__name__,
        precision,
    )


def _shape(states: Tensor | None) -> tuple[int, ...] | None:
    """The sizes that do not grow with the cache."""
    return None if states is None else tuple(states.shape[:2])


def _layout(states: Tensor) -> tuple[bool, ...]:
    outer, head, row, _ = states.stride()
    return states.is_contiguous(), outer >= head, head >= row, states.is_inference(), states.requires_grad


def padded_to_power_of_two(
    query: Tensor, valid: Tensor, marks: Marks, scorer: Scorer
) -> tuple[Tensor, Tensor, Marks, Scorer]:
    """Queries without valid keys behind the others, so that few numbers of queries are compiled for.

    Args:
        query: float [B, Hq, Q, D].
        valid: bool [B or 1, 1, 1, Q, T].
        marks: of the valid keys.
        scorer: theirs; scores that are `Given` are padded, too.
    """
    q_len = query.shape[2]
    extra = (1 << (q_len - 1).bit_length()) - q_len
    if isinstance(scorer, Given):
        scorer = Given(F.pad(scorer.scores, (0, 0, 0, extra)))

    def padded(states: Tensor, fill: float = 0) -> Tensor:
        return F.pad(states, (0, 0, 0, extra), value=fill)

    forced = None if marks.forced is None else padded(marks.forced)
    sample = None if marks.sample is None else padded(marks.sample, -1)
    return padded(query), padded(valid), Marks(forced, sample), scorer


def beyond_the_limit(compile_another: Callable[[int], Step]) -> Step:
    """A step that is compiled by a new function where Dynamo has given one all the graphs it may have.

    Args:
        compile_another: makes the function of a number, counted from 0.
    """
    steps = [compile_another(0)]

    def call(*args: Any) -> Tensor:
        for step in steps:
            try:
                return step(*args)
            except FailOnRecompileLimitHit:
                continue
        steps.append(compile_another(len(steps)))
        return steps[-1](*args)

    return call
