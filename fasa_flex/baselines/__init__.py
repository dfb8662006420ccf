"""Rival ways to choose the same number of keys: same budget, same selection, same attention, another scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from fasa_flex.baselines.scorers import AllDimensions, Recency
from fasa_flex.config import Sharing, check_choice
from fasa_flex.profile import FasaProfile
from fasa_flex.scoring import DominantChunks, Scorer

__all__ = ["AllDimensions", "Method", "Recency", "scorer_factory"]

Method = Literal["streaming_llm", "oracle", "random_chunks"]


def scorer_factory(
    method: Method,
    profile: FasaProfile | None = None,
    *,
    n_tip: int | None = None,
    per: Sharing = "kv_head",
    seed: int = 0,
) -> Callable[[int], Scorer]:
    """The ``scorer=`` argument of `enable` for a baseline.

    Args:
        method: ``"streaming_llm"`` (most recent; force sinks with ``FasaConfig(n_sink=8)``), ``"oracle"`` (the full dot
            product) or ``"random_chunks"`` (as FASA, with chunks drawn at random).
        profile: the model's; ``"random_chunks"`` takes its shape.
        n_tip: as in `FasaConfig`, for ``"random_chunks"``.
        per: as in `FasaConfig`, for ``"random_chunks"``.
        seed: of the private generator that draws the chunks.

    Raises:
        ValueError: an unknown method, or random chunks without a profile.
    """
    check_choice("method", method, Method)
    if method == "streaming_llm":
        return lambda layer: Recency()
    if method == "oracle":
        return lambda layer: AllDimensions()
    if profile is None:
        raise ValueError("method 'random_chunks' draws as many chunks as a profile has heads; pass profile=.")
    layers, query_heads, chunks = profile.agreement.shape
    heads = profile.provenance.kv_heads if per == "kv_head" else query_heads
    drawn = torch.rand(layers, heads, chunks, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    dims = profile.layout.chunks[drawn[..., : n_tip or max(1, profile.layout.head_dim // 8)]]
    return lambda layer: DominantChunks.from_chunks(dims[layer])
