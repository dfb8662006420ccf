"""Calibration on texts: generate with dense attention, then measure every decoded query against its keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.calibration.agreement import contextual_agreement
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.provenance import Provenance
from fasa_flex.calibration.provenance import version_of as version_of
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.budget import check_count, plain_number
from fasa_flex.core.criteria import causal, logit_statistics
from fasa_flex.errors import ArgumentTypeError, NotSupportedError
from fasa_flex.hf.attention_call import AttentionCall
from fasa_flex.hf.attention_routing import reading
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import (
    attention_shape,
    check_supported,
    device_of,
    evaluating,
    maximum_positions,
)
from fasa_flex.hf.wrappers import run_decoder, unwrapped


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    samples: Sequence[Tensor] | Sequence[str],
    top_k: int = 256,
    max_new_tokens: int = 64,
    progress: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layout: RotaryLayout | None = None,
) -> FasaProfile:
    """Measure a model's chunks on a few samples that resemble its later prompts; the profile serves every criterion.

    The model continues each sample greedily with dense attention for up to ``max_new_tokens`` tokens. One more dense
    forward then compares the decoded tokens' queries with all their keys and measures contextual agreement (the paper's
    criterion, which it measures on one document), the variance over keys of each chunk's part of the logits, the
    covariance of these parts, and the mean key (`fasa_flex.core.criteria`). Every query has the same weight. Global
    random state is neither read nor changed.

    Args:
        model: a transformers causal language model with RoPE, or without positions.
        samples: 1-D LongTensors of token ids, or texts with ``tokenizer=``; each of at least ``top_k`` tokens.
        top_k: K of contextual agreement; the paper uses 256.
        max_new_tokens: decode steps of each sample.
        progress: show a progress bar.
        tokenizer: encodes samples that are texts.
        layout: the chunks to measure; None is the model's own rotary planes, which FASA needs.

    Raises:
        TypeError: a sample that is neither a text nor a 1-D LongTensor.
        NotImplementedError: a model without frequency chunks (`RotaryLayout.detect`), or one that does not generate
            token ids.
        ValueError: samples that are empty, too short or too long for the model.
    """
    model = unwrapped(model)
    check_supported(model)
    top_k, max_new_tokens = plain_number(top_k), plain_number(max_new_tokens)
    check_count("top_k", top_k, 1)
    check_count("max_new_tokens", max_new_tokens, 1)
    encoded = encode_samples(model, samples, tokenizer, least=top_k, new_tokens=max_new_tokens)
    layout = RotaryLayout.detect(model) if layout is None else layout
    total: dict[str, Tensor | float] = dict.fromkeys(("agreement", "variance", "covariance", "mean_key"), 0.0)
    queries = 0
    with evaluating(model):
        for ids in tqdm(encoded, desc="calibrating", unit="sample", disable=not progress):
            full = _continue(model, ids, max_new_tokens)
            decoded = len(full) - len(ids)
            for name, table in _sample_tables(model, full, decoded, layout, top_k).items():
                total[name] += table * decoded
            queries += decoded
    hashes = tuple(hashlib.sha256(str(ids.tolist()).encode()).hexdigest() for ids in encoded)
    provenance = Provenance.of(model, top_k=top_k, max_new_tokens=max_new_tokens, queries=queries, sample_hashes=hashes)
    tables = {name: torch.as_tensor(table) / queries for name, table in total.items()}
    return FasaProfile(tables.pop("agreement").clamp(0, 1), layout, provenance, **tables)


def encode_samples(
    model: PreTrainedModel,
    samples: Sequence[Tensor] | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    least: int = 1,
    new_tokens: int = 0,
) -> list[Tensor]:
    """Samples as checked 1-D LongTensors of token ids, on CPU.

    Args:
        model: the model, which limits token ids and length.
        samples: token ids, or texts.
        tokenizer: encodes texts.
        least: fewest tokens of a sample, K of contextual agreement.
        new_tokens: tokens to generate after each sample.

    Raises:
        TypeError: a sample that is neither a text nor a 1-D LongTensor.
        ValueError: no samples, or one that does not fit the model.
    """
    encoded = [_encode(sample, tokenizer) for sample in samples]
    if not encoded:
        raise ValueError("calibration needs at least one sample, got none; pass a long text or two.")
    limit = maximum_positions(model)
    vocabulary = _vocabulary(model)
    for number, ids in enumerate(encoded):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"sample {number} holds token ids {int(ids.min())}..{int(ids.max())}, the model's vocabulary has "
                f"{vocabulary}; encode it with the model's own tokenizer."
            )
        if len(ids) < least:
            raise ValueError(
                f"sample {number} has {len(ids)} tokens, calibration needs at least {least} (top_k for agreement); "
                "pass longer samples or a smaller top_k."
            )
        if limit is not None and len(ids) + new_tokens > limit:
            raise ValueError(
                f"sample {number} has {len(ids)} tokens and {new_tokens} to generate, the model takes {limit}; "
                "shorten the sample or lower max_new_tokens."
            )
    return encoded


def _vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids that a model embeds."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a model of several models, such as Qwen2.5-Omni
        size = None
    return int(size or model.config.get_text_config().vocab_size)


def _encode(sample: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if isinstance(sample, str):
        if tokenizer is None:
            raise ValueError("samples are texts but no tokenizer was given; pass tokenizer=.")
        return torch.tensor(tokenizer(sample)["input_ids"], dtype=torch.long)
    if not isinstance(sample, Tensor) or sample.dim() != 1 or sample.is_floating_point():
        shape = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise ArgumentTypeError(f"a sample must be a text or a 1-D LongTensor of token ids, got {shape}.")
    return sample.long().cpu()


_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(("temperature", "top_p", "top_k", "max_time", "stop_strings", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens")),
    **dict.fromkeys(("begin_suppress_tokens", "prompt_lookup_num_tokens", "cache_implementation")),
}
"""Options of greedy generation, which override the model's generation config."""


def _continue(model: PreTrainedModel, ids: Tensor, max_new_tokens: int) -> Tensor:
    """The sample and its greedy dense continuation of at least one token: token ids [n]."""
    prompt = ids[None].to(device_of(model))
    try:
        full = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            **_GREEDY,
        )
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError, RuntimeError) as error:  # such as for want of an image
        raise NotSupportedError(
            f"{type(model).__name__} does not continue a text without other inputs ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); call enable without a profile, which calibrates on the prompt."
        ) from error
    result: Tensor = full[0]
    if result.dim() != 1 or len(result) <= len(ids) or not torch.equal(result[: len(ids)].cpu(), ids):
        raise NotSupportedError(
            f"{type(model).__name__} does not continue a text with token ids, got {tuple(full.shape)} for "
            f"{len(ids)} tokens; call enable without a profile, which calibrates on the prompt."
        )
    return result


def _sample_tables(
    model: PreTrainedModel, ids: Tensor, decoded: int, layout: RotaryLayout, top_k: int
) -> dict[str, Tensor]:
    """Tables of the last ``decoded`` queries of one dense forward: float64, on CPU."""
    layers, heads, kv_heads, head_dim = attention_shape(model)
    shard = HeadShard.of(model)
    chunks = len(layout.chunks)
    shapes = {
        "agreement": (heads, chunks),
        "variance": (heads, chunks),
        "covariance": (kv_heads, chunks, chunks),
        "mean_key": (kv_heads, head_dim),
    }
    tables = {name: torch.zeros(layers, *shape, dtype=torch.float64) for name, shape in shapes.items()}

    def measure(call: AttentionCall) -> None:
        query, key, layer = call.query, call.key, call.layer
        if layer not in layout.unserved_layers:
            last, visible = query[:, :, -decoded:], causal(decoded, key.shape[2], key.device)
            tables["agreement"][layer] = shard.whole(contextual_agreement(last, key, layout, top_k))  # refuses NaN
            parts = logit_statistics(last, key, visible, layout.chunks, call.scaling)
            for name, part in vars(parts).items():
                tables[name][layer] = shard.whole(part)

    with reading(model, measure):
        run_decoder(model, input_ids=ids[None].to(device_of(model)), use_cache=False)
    return tables
