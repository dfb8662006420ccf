"""FASA in a Hugging Face model: `enable` routes the model's attention through TIP and FAC, `Fasa.disable` undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.calibration.from_prompt import PromptCalibration
from fasa_flex.calibration.profile import FasaProfile, check_kinds
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.adapted_scorers import as_scorer
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import attention_modules, check_supported, dense_layers, device_of
from fasa_flex.hf.probe import check_attention
from fasa_flex.hf.wrappers import unwrapped
from fasa_flex.model.handle import Fasa
from fasa_flex.prefill.estimators import BlockEstimator, pooled

ScorerFactory = Callable[[int], "Scorer | Callable[..., Tensor]"]
"""Takes a layer number and returns the scorer of that layer: a `Scorer`, or a function with the arguments of one."""


def enable(
    model: PreTrainedModel,
    profile: FasaProfile | None = None,
    config: FasaConfig | None = None,
    *,
    scorer: ScorerFactory | None = None,
    estimator: BlockEstimator = pooled,
) -> Fasa:
    """Let ``model`` decode with frequency-aware sparse attention, until `Fasa.disable`.

    Attention stays dense in the prefill unless ``config.prefill`` says otherwise, in ``config.dense_layers``, and in
    layers with a sliding window, for instance (`Fasa.dense_layers` gives the reason for each). In all other layers
    every query decoded after the prefill selects its own ``n_fac`` keys. No key is evicted from the cache. No class is
    patched: FASA registers an attention function under its own name and gives the model's layers a copy of their config
    with this name, and the model an attribute by which `generate` asks for a cache. The function serves these layers
    alone, so that models with different profiles and budgets can run in one process.

    On a GPU a `generate` that names no cache takes a static one, which transformers compiles, once that saves time
    (`fasa_flex.model.decode_cache`); ``cache_implementation="dynamic"`` keeps the cache that grows.

    If the cache's keys are replaced or written to in place, FASA packs them again, except after writes that PyTorch
    does not count, such as those through ``keys.data`` (`FasaCache`).

    In `generate` FASA knows the end of the prompt: the last chunk (``prefill_chunk_size``) and a one-token suffix on an
    earlier cache are prefill. In a decode loop of your own a forward of one token counts as decoding; state the end of
    the prompt with `Fasa.sparse_from`.

    In continuous batching (`generate_batch`, ``transformers serve``) prompts are dense and decoded tokens sparse,
    request by request. Settings that are not served there make requests fail with the reason.

    Without a profile the model calibrates itself: all attention is dense until a forward of several tokens reads a
    prompt of at least 128 tokens, and the last queries of this prompt choose the chunks of each layer
    (`fasa_flex.calibration.from_prompt`). The chunks stay until `Fasa.recalibrate`; `Fasa.profile` can be saved.

    Of a model that transformers shards by heads (``DistributedConfig(tp_size=N)``) each process selects for its own
    key/value heads (`fasa_flex.hf.head_shard`); all processes must call `enable` alike. Profile and counts are those of
    the whole model.

    Args:
        model: a transformers model with attention implementation "sdpa" or "eager", or a PEFT or compiled model that
            wraps one.
        profile: result of `calibrate`; None: the first long prompt calibrates, unless there is a ``scorer``.
        config: budget and options; None: the defaults of `FasaConfig`.
        scorer: makes the scorer of a layer for another method than FASA; needs no profile.
        estimator: with ``config.prefill == "blocks"``, estimates the attention between blocks of the prompt
            (`fasa_flex.prefill.estimators`).

    Returns:
        a handle with ``stats`` and ``disable()``; also a context manager that disables at its end.

    Raises:
        ValueError: the profile does not fit the model, or the model does not support the settings.
        NotImplementedError: the model is divided over processes in another way (`HeadShard.of`).
    """
    model = unwrapped(model)
    check_supported(model)
    config = FasaConfig() if config is None else config
    check_kinds(profile, config)
    prompt = PromptCalibration(model, config) if profile is None and scorer is None else None
    initial = profile if prompt is None else prompt.blank
    unserved: tuple[int, ...] = ()
    if initial is not None:
        initial.check_fits(model)
        unserved = initial.layout.unserved_layers
        scorer = scorer or dominant_chunks(initial, config)
    seen = check_attention(model)
    assert scorer is not None
    dense = dense_layers(model, config.dense_layers, unserved, seen)
    layers = sorted(attention_modules(model))
    if not set(layers) - set(dense):
        warnings.warn(f"every layer of {type(model).__name__} stays dense ({dense}): nothing is sparse.", stacklevel=2)
    shard = HeadShard.of(model)
    with torch.inference_mode(False):  # inference tensors could not be used outside it
        scorers = {
            layer: _placed(shard.scorer(as_scorer(scorer(layer), layer)), model, layer, config)
            for layer in layers
            if layer not in dense
        }
    return Fasa(model, config, scorers, dense, profile if prompt is None else prompt, estimator)


def _placed(scorer: Scorer, model: PreTrainedModel, layer: int, config: FasaConfig) -> Scorer:
    """Move a scorer of chunks to the layer's device, where its packed keys will be, and set its ``packed_dtype``."""
    if not isinstance(scorer, DominantChunks):
        return scorer
    if scorer.dtype is None and config.per == "kv_head":
        scorer = replace(scorer, dtype=config.packed_dtype)
    return scorer.to(device_of(attention_modules(model)[layer], model))
