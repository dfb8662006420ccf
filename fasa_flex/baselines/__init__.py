"""Rival ways to choose the same number of keys: same budget, same selection, same attention, another scorer.

Each states the bytes it reads (`fasa_flex.core.bytes_read`), and in its docstring what it leaves out of its paper.
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
from fasa_flex.core.scoring import DominantChunks, Scorer, SequenceScorer

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

_AS_THEY_ARE: dict[str, Callable[[], Scorer | SequenceScorer]] = {
    "streaming_llm": Recency,
    "oracle": AllDimensions,
    "snapkv": SnapKV,
    "h2o": H2O,
    "rkv": RKV,
    "quest": Quest,
}


RANKING_OPTIONS = ("n_tip", "criterion", "packed_dtype")
"""Fields of `FasaConfig` that say how FASA ranks keys, and mean nothing to many a baseline."""

_HEARD: dict[str, tuple[str, ...]] = {
    "fasa": RANKING_OPTIONS,
    "random_chunks": ("n_tip", "packed_dtype"),
    "adjacent_pairs": ("n_tip", "packed_dtype"),
    "double_sparsity": ("n_tip", "packed_dtype"),
    "sparq": ("n_tip",),
    "vattention": ("n_tip", "packed_dtype"),
}


def unheard(method: str) -> tuple[str, ...]:
    """Which of `RANKING_OPTIONS` a method, ``"fasa"`` or a baseline, does not go by."""
    return tuple(name for name in RANKING_OPTIONS if name not in _HEARD.get(method, ()))


def scorer_factory(
    method: Method,
    profile: FasaProfile | None = None,
    *,
    n_tip: int | None = None,
    per: Sharing = "kv_head",
    seed: int = 0,
    channels: Tensor | None = None,
    packed_dtype: PackedDtype | None = None,
) -> Callable[[int], Scorer | SequenceScorer]:
    """The ``scorer=`` argument of `enable` for a baseline; a new one for every `enable`.

    Args:
        method: ``"streaming_llm"`` (most recent; force sinks with ``FasaConfig(n_sink=8)``), ``"oracle"`` (the full dot
            product), ``"random_chunks"`` (as FASA, with chunks drawn at random), ``"adjacent_pairs"`` (as FASA's
            released code, with chunks (2i, 2i + 1)), ``"snapkv"``, ``"h2o"``, ``"rkv"`` (these three evict for good),
            ``"quest"``, ``"sparq"``, ``"double_sparsity"`` or ``"vattention"`` (half of the budget a random sample of
            the other keys, `Sampled`; the best by exact scores, or as FASA ranks where there is a profile).
        profile: the model's: ``"random_chunks"`` takes its shape; of ``"adjacent_pairs"``, one calibrated with that
            layout (`adjacent_pairs`).
        n_tip: chunks, for methods that score by some dimensions: ``"sparq"`` and ``"double_sparsity"`` take
            ``2 * n_tip`` of them, as many as FASA reads; by default all read a quarter of a key.
        per: as in `FasaConfig`, for chunks.
        seed: of the private generator that draws the chunks, or of what ``"vattention"`` draws.
        channels: what `channel_weights` makes, for ``"double_sparsity"``.
        packed_dtype: as in `FasaConfig`, for ``"vattention"``; chunks of the other methods follow the config's.

    Raises:
        ValueError: an unknown method, one without what it needs, or ``n_tip`` for one that takes none.
    """
    check_choice("method", method, Method)
    if n_tip is not None and "n_tip" in unheard(method):
        raise ValueError(f"method {method!r} scores by no chunks, so it takes no n_tip, got {n_tip}; leave it out.")
    if method in _AS_THEY_ARE:
        return lambda layer: _AS_THEY_ARE[method]()
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
