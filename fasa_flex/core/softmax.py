"""Scaling, cap and learned sinks of a model's softmax, which sparse attention applies to the selected logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """The softmax of a model's attention.

    Attributes:
        scaling: factor that the softmax multiplies dot products by.
        softcap: c of ``c * tanh(logits / c)``, applied to scaled logits (Gemma 2); None: no cap.
        sinks: float [Hq], one extra logit per query head, which takes weight and has no value (gpt-oss); None: none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it has neither a cap nor learned sinks."""
        return self.softcap is None and self.sinks is None

    def logits(self, scores: Tensor) -> Tensor:
        """Scale dot products and apply the cap."""
        scaled = scores * self.scaling
        return scaled if self.softcap is None else self.cap(scaled)

    def cap(self, logits: Tensor) -> Tensor:
        """Apply the cap to scaled logits."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def with_sinks(out: Tensor, lse: Tensor, share: Tensor | None, sinks: Tensor) -> Tensor:
    """Reduce attention that was computed without learned sinks by the weight that these take.

    Args:
        out: [B, Hq, Q, Dv], attention without sinks.
        lse: float32 [B, Hq, Q], the log-sum-exp of the selected keys' exact logits.
        share: float32 [B, Hkv, G, Q], share of the valid keys' attention mass on the selected keys; None: 1.
        sinks: float [Hq], logits of the sinks.
    """
    mass = lse if share is None else lse - share.flatten(1, 2).log()
    weighed: Tensor = out * torch.sigmoid(mass - sinks.float()[:, None])[..., None]
    return weighed.to(out.dtype)
