"""The scorers of a model's layers (TIP), from a profile and a config."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.scoring import DominantChunks


def dominant_chunks(profile: FasaProfile, config: FasaConfig) -> Callable[[int], DominantChunks]:
    """A function that makes the scorer of a layer, with tensors on the CPU.

    Raises:
        ValueError: more chunks than a head has, or a criterion that the profile does not serve.
    """
    n_tip = config.chunks_of(profile.layout.head_dim)
    dims = profile.dominant_dims(n_tip, config.per, config.criterion)
    weights = profile.weights(n_tip, config.criterion)
    if config.per == "query_head":  # these keys are not packed: full precision needs no mean key
        return lambda layer: DominantChunks(dims[layer].flatten(1).clone())
    by_dim = None if weights is None else weights.repeat_interleave(2, dim=-1)
    means = profile.mean_key if bool(profile.mean_key.any()) else None

    def scorer(layer: int) -> DominantChunks:
        with torch.inference_mode(False):  # inference tensors could not be used outside inference mode
            mean_key, factors = (None if table is None else table[layer].clone() for table in (means, by_dim))
            return DominantChunks(dims[layer].flatten(1).clone(), mean_key, factors, config.packed_dtype)

    return scorer
