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


def with_sinks(out: Tensor, lse: Tensor, share: Tensor | None, sinks: Tensor) -> Tensor:
    """Attention without learned sinks as it is with them: they take weight and carry no value.

    Args:
        out: [B, Hq, Q, Dv].
        lse: float32 [B, Hq, Q], the log-sum-exp of the selected keys' exact logits.
        share: of all keys' mass that the selected ones hold, float32 [B, Hkv, G, Q]; None: all of it.
        sinks: float [Hq], logits.
    """
    mass = lse if share is None else lse - share.flatten(1, 2).log()
    weighed: Tensor = out * torch.sigmoid(mass - sinks.float()[:, None])[..., None]
    return weighed.to(out.dtype)
