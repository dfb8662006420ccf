"""FASA inside a Hugging Face model: `enable` routes its attention through TIP and FAC, one reversible line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fasa_flex.calibration.from_prompt import PromptCalibration
from fasa_flex.calibration.profile import FasaProfile, check_kinds
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.scoring import DominantChunks, Scorer, SequenceScorer
from fasa_flex.hf.model_structure import attention_modules, check_supported, dense_layers, device_of
from fasa_flex.hf.probe import check_attention
from fasa_flex.hf.wrappers import unwrapped
from fasa_flex.model.handle import Fasa

ScorerFactory = Callable[[int], Scorer | SequenceScorer]
"""Makes the scorer of one layer."""


def enable(
    model: PreTrainedModel,
    profile: FasaProfile | None = None,
    config: FasaConfig | None = None,
    *,
    scorer: ScorerFactory | None = None,
) -> Fasa:
    """Let ``model`` decode with frequency-aware sparse attention, until `Fasa.disable`.

    The model attends densely in the prefill, in ``config.dense_layers``, and in layers without RoPE or with a sliding
    window (`Fasa.dense_layers` tells which and why); every query decoded after the prefill selects its own ``n_fac``
    keys elsewhere. Nothing is evicted from the cache. Nothing is patched: the attention function has a name of its own,
    which the configs of this model's layers carry, and serves these layers alone, so that models with different
    profiles and budgets live side by side.

    Packed keys follow a cache whose keys are replaced or written to in place, but for writes that PyTorch does not
    count, as through ``keys.data`` (`FasaCache`).

    Where the prompt ends, `generate` knows: its last chunk (``prefill_chunk_size``) or a suffix of one token on an
    earlier cache is still prefill. In a loop of one's own a forward of one token is a decoded one; there
    `Fasa.sparse_from` says where the prompt ends.

    Without a profile the model calibrates itself: everything is dense until a forward of several tokens reads a prompt
    of at least 128 tokens, whose last queries then choose the chunks of each layer
    (`fasa_flex.calibration.from_prompt`). They stay until `Fasa.recalibrate`, and `Fasa.profile` keeps them for another
    time.

    Args:
        model: a transformers model with attention implementation "sdpa" or "eager", also within PEFT's or a compiled
            one.
        profile: from `calibrate`; None: from the first long prompt, unless a ``scorer`` is given, which needs none.
        config: budget and options; None is `FasaConfig`'s defaults.
        scorer: another method than FASA: makes the scorer of a layer.

    Returns:
        a handle with ``stats`` and ``disable()``; also a context manager that disables at its end.

    Raises:
        ValueError: the profile does not fit the model, with the reason, or settings that this model cannot take.
    """
    model = unwrapped(model)
    check_supported(model)
    config = FasaConfig() if config is None else config
    check_kinds(profile, config)
    prompt = PromptCalibration(model, config) if profile is None and scorer is None else None
    known = profile if prompt is None else prompt.blank
    unrotated: tuple[int, ...] = ()
    if known is not None:
        known.check_fits(model)
        unrotated = known.layout.unrotated_layers
        scorer = scorer or dominant_chunks(known, config)
    seen = check_attention(model)
    assert scorer is not None
    dense = dense_layers(model, config.dense_layers, unrotated, seen)
    layers = sorted(attention_modules(model))
    if not set(layers) - set(dense):
        warnings.warn(f"every layer of {type(model).__name__} stays dense ({dense}): nothing is sparse.", stacklevel=2)
    with torch.inference_mode(False):  # what is made here serves inside and outside of it
        scorers = {layer: _placed(scorer(layer), model, layer, config) for layer in layers if layer not in dense}
    return Fasa(model, config, scorers, dense, profile if prompt is None else prompt)


def _placed(
    scorer: Scorer | SequenceScorer, model: PreTrainedModel, layer: int, config: FasaConfig
) -> Scorer | SequenceScorer:
    """A scorer of chunks on the device that holds the layer, where its packed keys will be, in ``packed_dtype``."""
    if not isinstance(scorer, DominantChunks):
        if not callable(scorer) and not isinstance(scorer, SequenceScorer):
            raise ValueError(f"the scorer of layer {layer} is {scorer!r}, no Scorer or SequenceScorer; return one.")
        return scorer
    if scorer.dtype is None and config.per == "kv_head":
        scorer = replace(scorer, dtype=config.packed_dtype)
    return scorer.to(device_of(attention_modules(model)[layer], model))
