"""Measure the chunks of a model, once: dense generation, then every decode query against its keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.calibration.agreement import contextual_agreement
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.provenance import Provenance, config_hash
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.budget import check_count, plain_number
from fasa_flex.core.criteria import causal, logit_statistics
from fasa_flex.hf.attention_routing import AttentionResult, AttentionSeam, DenseAttention
from fasa_flex.hf.forward_checks import scaling_of
from fasa_flex.hf.model_structure import (
    attention_shape,
    check_supported,
    device_of,
    evaluating,
    layer_of,
    maximum_positions,
)
from fasa_flex.hf.wrappers import unwrapped


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
    """Measure what every criterion needs, on a few samples such as the model will read: texts, prompts with questions.

    Each sample is continued greedily with dense attention for up to ``max_new_tokens`` tokens; the queries of the
    decoded tokens are then compared with all their keys in one more dense forward, which gives them the same values:
    contextual agreement (the paper's criterion; it uses one document), the variance over keys of each chunk's part of
    the logits, the covariance of these parts, and the mean key (`fasa_flex.core.criteria`). Every query weighs the
    same. No global random state is read or changed.

    Args:
        model: a transformers causal language model with RoPE.
        samples: 1-D LongTensors of token ids, or texts with ``tokenizer=``; each with at least ``top_k`` tokens.
        top_k: K of contextual agreement; the paper uses 256.
        max_new_tokens: decode steps a sample.
        progress: show a progress bar.
        tokenizer: encodes the samples when they are texts.
        layout: the chunks that are compared; None is the model's own planes, which is what FASA needs.

    Returns:
        the profile, which serves every criterion.

    Raises:
        ValueError: samples that are empty, too short or too long for the model, or a model without RoPE.
    """
    model = unwrapped(model)
    check_supported(model)
    top_k, max_new_tokens = plain_number(top_k), plain_number(max_new_tokens)
    check_count("top_k", top_k, 1)
    check_count("max_new_tokens", max_new_tokens, 1)
    encoded = encode_samples(model, samples, tokenizer, least=top_k, room=max_new_tokens)
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
    provenance = Provenance(
        model_id=model.config.name_or_path or type(model).__name__,
        model_type=model.config.get_text_config().model_type,
        config_hash=config_hash(model),
        kv_heads=attention_shape(model)[2],
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        queries=queries,
        sample_hashes=tuple(hashlib.sha256(str(ids.tolist()).encode()).hexdigest() for ids in encoded),
        versions={name: version_of(name) for name in ("fasa_flex", "torch", "transformers")},
    )
    tables = {name: torch.as_tensor(table) / queries for name, table in total.items()}
    return FasaProfile(tables.pop("agreement").clamp(0, 1), layout, provenance, **tables)


def encode_samples(
    model: PreTrainedModel,
    samples: Sequence[Tensor] | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    least: int = 1,
    room: int = 0,
) -> list[Tensor]:
    """Samples as 1-D LongTensors of token ids on CPU, checked.

    Args:
        model: whose vocabulary and longest sequence they must fit.
        samples: token ids, or texts.
        tokenizer: encodes the texts.
        least: tokens that each must have, K of contextual agreement.
        room: tokens to generate behind each.

    Raises:
        ValueError: no samples, or one that does not fit.
    """
    encoded = [_encode(sample, tokenizer) for sample in samples]
    if not encoded:
        raise ValueError("calibration needs at least one sample, got none; pass a long text or two.")
    limit = maximum_positions(model)
    embeddings = model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
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
        if limit is not None and len(ids) + room > limit:
            raise ValueError(
                f"sample {number} has {len(ids)} tokens and {room} to generate, the model takes {limit}; "
                "shorten the sample or lower max_new_tokens."
            )
    return encoded


def _encode(sample: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if isinstance(sample, str):
        if tokenizer is None:
            raise ValueError("samples are texts but no tokenizer was given; pass tokenizer=.")
        return torch.tensor(tokenizer(sample)["input_ids"], dtype=torch.long)
    if not isinstance(sample, Tensor) or sample.dim() != 1 or sample.is_floating_point():
        shape = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise ValueError(f"a sample must be a text or a 1-D LongTensor of token ids, got {shape}.")
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
"""Whatever the model's own generation config asks for."""


def _continue(model: PreTrainedModel, ids: Tensor, max_new_tokens: int) -> Tensor:
    """The sample and its dense greedy continuation, token ids [n]; at least one token longer."""
    prompt = ids[None].to(device_of(model))
    full = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        **_GREEDY,
    )
    result: Tensor = full[0]
    if result.dim() != 1 or len(result) <= len(ids) or not torch.equal(result[: len(ids)].cpu(), ids):
        raise ValueError(
            f"{type(model).__name__} does not continue a text with token ids, got {tuple(full.shape)} for "
            f"{len(ids)} tokens; call enable without a profile, which calibrates on the prompt."
        )
    return result


def _sample_tables(
    model: PreTrainedModel, ids: Tensor, decoded: int, layout: RotaryLayout, top_k: int
) -> dict[str, Tensor]:
    """The tables of a profile from the last ``decoded`` queries of one dense forward; float64, on CPU."""
    layers, heads, kv_heads, head_dim = attention_shape(model)
    chunks = len(layout.chunks)
    shapes = {
        "agreement": (heads, chunks),
        "variance": (heads, chunks),
        "covariance": (kv_heads, chunks, chunks),
        "mean_key": (kv_heads, head_dim),
    }
    tables = {name: torch.zeros(layers, *shape, dtype=torch.float64) for name, shape in shapes.items()}

    def measure(
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionResult:
        layer = layer_of(module)
        if layer not in layout.unrotated_layers:
            last, visible = query[:, :, -decoded:], causal(decoded, key.shape[2], key.device)
            tables["agreement"][layer] = contextual_agreement(last, key, layout, top_k)  # which refuses NaN
            parts = logit_statistics(last, key, visible, layout.chunks, scaling_of(query, kwargs))
            for name, part in vars(parts).items():
                tables[name][layer] = part
        return dense(module, query, key, value, attention_mask, **kwargs)

    with AttentionSeam(model, measure):
        model.base_model(input_ids=ids[None].to(device_of(model)), use_cache=False)
    return tables


def version_of(name: str) -> str:
    """The installed version of a package, for `Provenance`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
