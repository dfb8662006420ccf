"""What a model's attention does to its logits; sparse attention does the same to the selected ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """The model's own softmax.

    Attributes:
        scaling: what dot products are multiplied by.
        softcap: c of ``c * tanh(logits / c)``, applied to scaled logits (Gemma 2); None: no cap.
        sinks: float [Hq], one more logit for each query head, which takes weight and carries no value (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a scaled softmax and nothing else."""
        return self.softcap is None and self.sinks is None

    def logits(self, scores: Tensor) -> Tensor:
        """Dot products, scaled and under the cap."""
        scaled = scores * self.scaling
        return scaled if self.softcap is None else self.cap(scaled)

    def cap(self, logits: Tensor) -> Tensor:
        """Scaled logits under the cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
