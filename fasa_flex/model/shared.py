"""What the layers of a model under FASA share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from fasa_flex.calibration.from_prompt import PromptCalibration
from fasa_flex.core.config import Completion as CompletionKind
from fasa_flex.core.config import FasaConfig, GroupReduce
from fasa_flex.model.forwards import Forwards
from fasa_flex.model.stats import FasaStats


@dataclass(frozen=True)
class Shared:
    """One object of each kind for all layers of a model.

    Attributes:
        config: of `enable`.
        completion: what stands for the unselected keys.
        packs: whether caches hold packed keys.
        source: calibrates on a prompt; None: the scorers are known.
        forwards: where a forward stands.
        stats: counts.
    """

    config: FasaConfig
    completion: CompletionKind
    packs: bool
    source: PromptCalibration | None
    forwards: Forwards
    stats: FasaStats

    @property
    def group_reduce(self) -> GroupReduce:
        """How the query heads of a group rank keys."""
        return "none" if self.config.per == "query_head" else self.config.group_reduce


class OfOneModel:
    """What a model under FASA refers to, and a copy of it must not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """A copied model would go on counting and attending through this object.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be copied; disable() first, and enable the copy by itself.")

    def __reduce__(self) -> NoReturn:
        """A pickled model would be one without its handle.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be pickled; disable() first, or use its save_pretrained.")
