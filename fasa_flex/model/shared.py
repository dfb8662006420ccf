"""Objects that the layers of a model under FASA share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from fasa_flex.calibration.from_prompt import PromptCalibration
from fasa_flex.core.config import Completion as CompletionKind
from fasa_flex.core.config import FasaConfig, GroupReduce
from fasa_flex.model.forwards import Forwards
from fasa_flex.model.paged_forwards import PagedForwards
from fasa_flex.model.stats import FasaStats
from fasa_flex.prefill.estimators import BlockEstimator


@dataclass(frozen=True)
class Shared:
    """Settings and state that all layers of a model share.

    Attributes:
        config: settings passed to `enable`.
        completion: how to estimate the contribution of the unselected keys.
        packs: whether caches hold packed keys.
        source: calibrates on a prompt; None: every layer has its scorer from the start.
        forwards: state of the current forward of each thread.
        stats: counts of queries and selected tokens.
        estimator: estimates the attention between blocks of a prefill by blocks.
        paged: state of forwards of continuous batching.
    """

    config: FasaConfig
    completion: CompletionKind
    packs: bool
    source: PromptCalibration | None
    forwards: Forwards
    stats: FasaStats
    estimator: BlockEstimator
    paged: PagedForwards

    @property
    def group_reduce(self) -> GroupReduce:
        """How the scores of a group's query heads become one ranking."""
        return "none" if self.config.per == "query_head" else self.config.group_reduce

    @property
    def completes(self) -> bool:
        """Whether attention to the selected keys is completed."""
        return self.completion != "none"

    @property
    def strength(self) -> float:
        """Factor of the completion's first-order term; 0: there is none."""
        return self.config.completion_strength if self.completion == "first_order" else 0.0

    @property
    def samples(self) -> bool:
        """Whether a sample of the keys is marked, for the ranking or the completion."""
        return self.group_reduce == "softmax" or self.completes


class OfOneModel:
    """Base of objects that belong to one model, so that a copy of the model must not refer to them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse a copy, which would attend and count through the objects of the original model.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be copied; disable() first, and enable the copy by itself.")

    def __reduce__(self) -> NoReturn:
        """Refuse pickling, since the pickled model would have no handle.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be pickled; disable() first, or use its save_pretrained.")
