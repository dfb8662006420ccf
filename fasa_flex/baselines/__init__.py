"""Baselines: other scorers under the same budget, selection and attention as FASA.

Each baseline states the bytes it reads (`fasa_flex.core.bytes_read`); its docstring lists its differences from the
paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fasa_flex.baselines.calibrated import adjacent_pairs, channel_weights, heavy_channels
from fasa_flex.baselines.h2o import H2O
from fasa_flex.baselines.published import as_published
from fasa_flex.baselines.quest import Quest
from fasa_flex.baselines.sampled import Sampled
from fasa_flex.baselines.scorers import AllDimensions, Recency
from fasa_flex.baselines.sparq import SparQ
from fasa_flex.baselines.windowed import RKV, SnapKV
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.config import FasaConfig, Sharing, check_choice
from fasa_flex.core.option_types import PackedDtype
from fasa_flex.core.scoring import DominantChunks, Scorer

__all__ = [
    "H2O",
    "RANKING_OPTIONS",
    "RKV",
    "AllDimensions",
    "Method",
    "Quest",
    "Recency",
    "Sampled",
    "SnapKV",
    "SparQ",
    "adjacent_pairs",
    "as_published",
    "channel_weights",
    "scorer_factory",
    "unheard",
]

Method = Literal[
    "streaming_llm",
    "oracle",
    "random_chunks",
    "adjacent_pairs",
    "snapkv",
    "h2o",
    "rkv",
    "quest",
    "sparq",
    "double_sparsity",
    "vattention",
]

_WITHOUT_OPTIONS: dict[str, Callable[[], Scorer]] = {
    "streaming_llm": Recency,
    "oracle": AllDimensions,
    "snapkv": SnapKV,
    "h2o": H2O,
    "rkv": RKV,
    "quest": Quest,
}


RANKING_OPTIONS = ("n_tip", "criterion", "packed_dtype")
"""Fields of `FasaConfig` that decide how FASA ranks keys; many baselines do not use them."""

_USED: dict[str, tuple[str, ...]] = {
    "fasa": RANKING_OPTIONS,
    "random_chunks": ("n_tip", "packed_dtype"),
    "adjacent_pairs": ("n_tip", "packed_dtype"),
    "double_sparsity": ("n_tip", "packed_dtype"),
    "sparq": ("n_tip",),
    "vattention": ("n_tip", "packed_dtype"),
}


def unheard(method: str) -> tuple[str, ...]:
    """The `RANKING_OPTIONS` that a method, ``"fasa"`` or a baseline, does not use."""
    return tuple(name for name in RANKING_OPTIONS if name not in _USED.get(method, ()))


def scorer_factory(
    method: Method,
    profile: FasaProfile | None = None,
    *,
    n_tip: int | None = None,
    per: Sharing = "kv_head",
    seed: int = 0,
    channels: Tensor | None = None,
    packed_dtype: PackedDtype | None = None,
) -> Callable[[int], Scorer]:
    """The ``scorer=`` argument of `enable` for a baseline; make a new one for every `enable`.

    Args:
        method: ``"streaming_llm"`` (latest keys; force sinks with ``FasaConfig(n_sink=8)``), ``"oracle"`` (the full dot
            product), ``"random_chunks"`` (as FASA, with random chunks), ``"adjacent_pairs"`` (chunks (2i, 2i + 1), as
            in FASA's released code), ``"snapkv"``, ``"h2o"``, ``"rkv"`` (these three evict keys), ``"quest"``,
            ``"sparq"``, ``"double_sparsity"`` or ``"vattention"`` (`Sampled`: half of the budget is a random sample,
            the other half the best keys by exact scores, or by FASA's scores with a profile).
        profile: the model's profile. ``"random_chunks"`` takes its shape; ``"adjacent_pairs"`` needs one that was
            calibrated with the layout `adjacent_pairs`.
        n_tip: chunks of a head, for methods that score by some dimensions: ``"sparq"`` and ``"double_sparsity"`` take
            ``2 * n_tip`` dimensions, as many as FASA; the default is a quarter of a head's dimensions.
        per: heads that share chunks, as in `FasaConfig`.
        seed: seed of the private generator of random chunks or of ``"vattention"``'s sample.
        channels: the result of `channel_weights`, for ``"double_sparsity"``.
        packed_dtype: as in `FasaConfig`, for ``"vattention"``; the other methods take it from the config.

    Raises:
        ValueError: an unknown method, a method without its profile or channels, or ``n_tip`` for one without chunks.
    """
    check_choice("method", method, Method)
    if n_tip is not None and "n_tip" in unheard(method):
        raise ValueError(f"method {method!r} scores by no chunks, so it takes no n_tip, got {n_tip}; leave it out.")
    if method in _WITHOUT_OPTIONS:
        return lambda layer: _WITHOUT_OPTIONS[method]()
    if method == "sparq":
        return lambda layer: SparQ(n_tip=n_tip)
    if method == "double_sparsity":
        if channels is None:
            raise ValueError("method 'double_sparsity' is calibrated; pass channels=channel_weights(model, samples).")
        heavy = heavy_channels(channels, 2 * n_tip if n_tip else max(1, channels.shape[-1] // 4))
        return lambda layer: DominantChunks(heavy[layer])
    if method == "vattention":
        if profile is None:
            return lambda layer: Sampled(AllDimensions(), seed=1_000 * seed + layer)
        n_chunks = n_tip or max(1, profile.layout.head_dim // 8)
        ranker = dominant_chunks(profile, FasaConfig(n_tip=n_chunks, per=per, packed_dtype=packed_dtype))
        return lambda layer: Sampled(ranker(layer), seed=1_000 * seed + layer)
    if profile is None:
        raise ValueError(f"method {method!r} takes its chunks from a profile, got None; pass profile=.")
    n_tip = n_tip or max(1, profile.layout.head_dim // 8)
    if method == "adjacent_pairs":
        if not profile.layout.chunks.equal(adjacent_pairs(profile.layout).chunks):
            raise ValueError(
                f"the profile of {profile.provenance.model_id} was not calibrated for method 'adjacent_pairs'; "
                "pass one of calibrate(layout=adjacent_pairs(RotaryLayout.detect(model)))."
            )
        dims = profile.dominant_dims(n_tip, per, "agreement")
    else:
        layers, query_heads, chunks = profile.agreement.shape
        if n_tip > chunks:
            raise ValueError(f"n_tip must lie in 1..{chunks}, the chunks of a head, got {n_tip}.")
        heads = profile.provenance.kv_heads if per == "kv_head" else query_heads
        drawn = torch.rand(layers, heads, chunks, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        dims = profile.layout.chunks[drawn[..., :n_tip]]
    return lambda layer: DominantChunks.from_chunks(dims[layer])
