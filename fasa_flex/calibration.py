"""Find the dominant chunks of a model, once: dense generation, agreement of every decode query (Wang et al., 2026)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.agreement import contextual_agreement
from fasa_flex.layers import attention_shape, device_of, evaluating, layer_of, maximum_positions, supported
from fasa_flex.profile import FasaProfile, Provenance, config_hash
from fasa_flex.rotary import RotaryLayout
from fasa_flex.seam import AttentionResult, AttentionSeam, DenseAttention


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
    """Measure contextual agreement on a few samples; one long document is enough (the paper uses one).

    Each sample is continued greedily with dense attention for up to ``max_new_tokens`` tokens; the queries of the
    decoded tokens are then compared with all their keys in one more dense forward, which gives them the same values.
    Every query weighs the same. No global random state is read or changed.

    Args:
        model: a transformers causal language model with RoPE.
        samples: 1-D LongTensors of token ids, or texts with ``tokenizer=``; each with at least ``top_k`` tokens.
        top_k: K of contextual agreement; the paper uses 256.
        max_new_tokens: decode steps a sample.
        progress: show a progress bar.
        tokenizer: encodes the samples when they are texts.
        layout: the chunks that are compared; None is the model's own planes, which is what FASA needs.

    Returns:
        the profile, with float32 agreement [layers, query heads, chunks].

    Raises:
        ValueError: samples that are empty, too short or too long for the model, or a model without RoPE.
    """
    model = supported(model)
    if top_k < 1 or max_new_tokens < 1:
        raise ValueError(f"top_k and max_new_tokens must be at least 1, got {top_k} and {max_new_tokens}.")
    encoded = encode_samples(model, samples, tokenizer, least=top_k, room=max_new_tokens)
    layout = RotaryLayout.detect(model) if layout is None else layout
    layers, query_heads, kv_heads, _ = attention_shape(model)
    total = torch.zeros(layers, query_heads, len(layout.chunks), dtype=torch.float64)
    queries = 0
    with evaluating(model):
        for ids in tqdm(encoded, desc="calibrating", unit="sample", disable=not progress):
            full = _continue(model, ids, max_new_tokens)
            decoded = len(full) - len(ids)
            total += _sample_agreement(model, full, decoded, layout, top_k) * decoded
            queries += decoded
    provenance = Provenance(
        model_id=model.config.name_or_path or type(model).__name__,
        model_type=model.config.get_text_config().model_type,
        config_hash=config_hash(model),
        kv_heads=kv_heads,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        queries=queries,
        sample_hashes=tuple(hashlib.sha256(str(ids.tolist()).encode()).hexdigest() for ids in encoded),
        versions={name: version_of(name) for name in ("fasa_flex", "torch", "transformers")},
    )
    return FasaProfile((total / queries).float().clamp(0, 1), layout, provenance)


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


def _sample_agreement(model: PreTrainedModel, ids: Tensor, decoded: int, layout: RotaryLayout, top_k: int) -> Tensor:
    """Agreement of the last ``decoded`` queries in one dense forward; float64 [layers, Hq, chunks]."""
    layers, heads, _, _ = attention_shape(model)
    table = torch.zeros(layers, heads, len(layout.chunks), dtype=torch.float64)

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
            table[layer] = contextual_agreement(query[:, :, -decoded:], key, layout, top_k).double().cpu()
        return dense(module, query, key, value, attention_mask, **kwargs)

    with AttentionSeam(model, measure):
        model.base_model(input_ids=ids[None].to(device_of(model)), use_cache=False)
    return table


def version_of(name: str) -> str:
    """The installed version of a package, for `Provenance`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
