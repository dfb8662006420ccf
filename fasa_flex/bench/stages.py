"""Times of the stages of one sparse attention call, each measured alone.

A compiled call fuses stages, which are separate here, so their sum exceeds the call's time; compare their shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasa_flex.backends.gather import gather_focused
from fasa_flex.bench.rivals import Inputs
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.timing import interleave
from fasa_flex.core.completion import Completion, completed, kept_share
from fasa_flex.core.group_reduce import reduce_group, weigh
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.selection import Marks, Selection, select
from fasa_flex.core.softmax import Softmax

STAGES = ("scores", "group ranking", "selection", "attention", "completion")


def stage_seconds(layers: Sequence[Inputs], settings: Settings) -> dict[str, float]:
    """Median seconds of each of `STAGES` in one call of the gather backend, compiled if the run compiles.

    Args:
        layers: inputs that are used in turn, so that none is in the processor's cache.
        settings: settings of the run.
    """
    compiled = "compiled" in settings.modes
    calls = {
        name: _over(layers, torch.compile(stage, dynamic=settings.dynamic) if compiled else stage, prepare)
        for name, (stage, prepare) in _stages(settings).items()
    }
    for call in calls.values():
        call()
    times = interleave(calls, settings.device, settings.repeats, settings.seconds / 4)
    return {name: timing.median / len(layers) for name, timing in times.items()}


def _stages(settings: Settings) -> dict[str, tuple[Callable[..., Any], Callable[[Inputs], tuple[Any, ...]]]]:
    """Each stage's function, and a function that computes its arguments."""
    budget = settings.budget

    def softmax(x: Inputs) -> Softmax:
        return Softmax(x.q.shape[-1] ** -0.5)

    def scores(x: Inputs) -> Tensor:
        return DominantChunks.from_chunks(x.chunks)(x.q, x.k, x.packed)

    def ranking(found: Tensor, x: Inputs) -> Tensor:
        return reduce_group(found, x.valid, settings.group_reduce, softmax(x), _marks(x).sample)

    def selection(ranked: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
        chosen = select(ranked, x.valid, budget, _marks(x).forced)
        return chosen.slots, chosen.taken

    def attention(slots: Tensor, taken: Tensor, x: Inputs) -> Tensor:
        chosen = Selection(slots, taken, slots)  # the order is needed for masks only
        return gather_focused(x.q, x.k, x.v, chosen, softmax(x))[0]

    def completion(out: Tensor, found: Tensor, slots: Tensor, taken: Tensor, x: Inputs) -> Tensor:
        if x.state is None:
            return out
        logits, sample = softmax(x).logits(found), _marks(x).sample
        assert sample is not None
        share = kept_share(logits, weigh(logits, x.valid, sample), Selection(slots, taken, slots))
        estimate = Completion(settings.strength, x.state)
        return completed(out, None, share, estimate, softmax(x), x.q, x.k, x.v, x.valid)

    def chosen(x: Inputs) -> tuple[Tensor, Tensor]:
        return selection(ranking(scores(x), x), x)

    stages = (scores, ranking, selection, attention, completion)
    starts: tuple[Callable[[Inputs], tuple[Any, ...]], ...] = (
        lambda x: (x,),
        lambda x: (scores(x), x),
        lambda x: (ranking(scores(x), x), x),
        lambda x: (*chosen(x), x),
        lambda x: (attention(*chosen(x), x), scores(x), *chosen(x), x),
    )
    return dict(zip(STAGES, zip(stages, starts, strict=True), strict=True))


def _marks(x: Inputs) -> Marks:
    return Marks(None, None) if x.marks is None else x.marks


def _over(
    layers: Sequence[Inputs], stage: Callable[..., Any], prepare: Callable[[Inputs], tuple[Any, ...]]
) -> Callable[[], None]:
    started = [prepare(x) for x in layers]

    def run() -> None:
        for arguments in started:
            stage(*arguments)

    return run
