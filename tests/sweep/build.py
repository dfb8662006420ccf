"""Small random models of any class of transformers, from its config's own defaults with smaller numbers.

A text decoder shrinks in every size, and to so few layers that each kind of layer is there. Of a tower (vision, audio)
only the layers shrink: text alone is decoded, and its widths then fit the projectors.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from sweep.stated import BEFORE, STATED
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY, HIDDEN, HEADS, HEAD_DIM, WINDOW = 64, 64, 4, 16, 16
LEAST_LAYERS, MOST_LAYERS = 4, 8
MOST_PARAMETERS = 300_000_000
MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ")

Rule = Callable[[Any, dict[str, Any]], Any]


class NotBuiltError(Exception):
    """The class cannot be built small; the message is the reason."""


def class_names() -> list[str]:
    """Every causal, vision-language and audio-language class of the installed transformers, in alphabetical order."""
    found: set[str] = set()
    for name in MAPPINGS:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).values():
            found.update([classes] if isinstance(classes, str) else classes)
    return sorted(found)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A small random model of a class, float32, in evaluation mode.

    Raises:
        NotBuiltError: it cannot be built.
    """
    kind = getattr(transformers, name, None)
    if kind is None:
        raise NotBuiltError(f"transformers {transformers.__version__} has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = shrunk(kind.config_class, STATED.get(name, {}))
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
        except Exception as error:  # the model's code may raise anything
            raise NotBuiltError(_line(error)) from error
        if count > MOST_PARAMETERS:
            raise NotBuiltError(f"{count / 1e6:.0f} million parameters with small numbers")
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = kind(config).eval().float()
        except Exception as error:
            raise NotBuiltError(_line(error)) from error
    _settle(model, seed)
    return model


def _settle(model: PreTrainedModel, seed: int) -> None:
    """No early end of a generation, and learned sinks that are not all alike."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.use_cache = True
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def shrunk(kind: type[PreTrainedConfig], stated: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of defaults with smaller numbers, and with the fields ``stated`` ("text_config.head_dim")."""
    default = kind(**BEFORE.get(kind.__name__, {}))
    text = default.get_text_config()
    fields = _fields(default, getattr(text, "hidden_size", None))
    fields.pop("model_type", None)
    for path, value in stated.items():
        *folders, name = path.split(".")
        place = fields
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return kind(**fields)


def _fields(config: PreTrainedConfig, hidden: int | None) -> dict[str, Any]:
    stated = {name: value for name, value in config.to_dict().items() if name not in _LEFT_OUT}
    inner = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    own = {name: value for name, value in stated.items() if name not in inner}
    own = _text(config, own) if _is_text(config) else _tower(config, own, hidden)
    return {**own, **{name: _fields(value, hidden) for name, value in inner.items()}}


_LEFT_OUT = {
    *("transformers_version", "architectures", "id2label", "label2id", "problem_type", "dtype", "return_dict"),
    *("output_hidden_states", "output_attentions", "_name_or_path", "chunk_size_feed_forward", "is_encoder_decoder"),
    "num_labels",
}
_TO_TEXT = re.compile(r"out_hidden_size|text_hidden_size|output_dim|projection_dim|projector_output_dim")
_WIDE, _IDS = 3000, 16000  # of a tower; larger numbers are token ids, and rates
_LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers"
    r"|(encoder|decoder)_num_(hidden_)?layers|depth|layers|num_blocks|num_global_layers|speech_encoder_layers"
    r"|t2u_(encoder|decoder)_layers|conf_num_hidden_layers)"
)


def _is_text(config: PreTrainedConfig) -> bool:
    names = set(vars(config)) | set(type(config).attribute_map)
    layers = any(map(_LAYERS.fullmatch, names)) or hasattr(config, "num_hidden_layers")
    return "vocab_size" in names and "hidden_size" in names and layers


def _tower(config: PreTrainedConfig, fields: dict[str, Any], hidden: int | None) -> dict[str, Any]:
    """Two layers, the text decoder's width where the tower states it, and smaller sizes if it is wide."""
    made = _few_layers(config, fields, least=2, most=2)
    if max(value for value in (0, *fields.values()) if type(value) is int and value < _IDS) >= _WIDE:
        made = {name: _small(name, value, fields) for name, value in made.items()}
    return {name: HIDDEN if value == hidden and _TO_TEXT.fullmatch(name) else value for name, value in made.items()}


# Text decoders.


def _text(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    made = _few_layers(config, fields)
    for name, value in made.items():
        made[name] = _small(name, value, fields)
    return made


def _small(name: str, value: Any, fields: dict[str, Any]) -> Any:
    for pattern, rule in RULES:
        if pattern.fullmatch(name):
            return _each(rule, value, fields)
    return value


def _each(rule: Rule, value: Any, fields: dict[str, Any]) -> Any:
    if isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value):
        return [rule(one, fields) for one in value]
    if type(value) in (int, float, bool) or isinstance(value, dict):
        return rule(value, fields)
    return value


def _first(fields: dict[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if type(fields.get(name)) is int), None)


def _heads_of(fields: dict[str, Any]) -> int | None:
    return _first(fields, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")


def _head_dim_of(fields: dict[str, Any]) -> int:
    stated = _first(fields, "head_dim", "kv_channels", "d_kv")
    if stated:
        return int(stated)
    hidden, heads = _first(fields, "hidden_size", "d_model", "n_embd"), _heads_of(fields)
    return hidden // heads if hidden and heads else 64


def _kv_heads(value: int, fields: dict[str, Any]) -> int:
    heads = _heads_of(fields)
    return min(value, HEADS if heads is None or value >= heads else HEADS // 2)


def _head_dim(value: int, fields: dict[str, Any]) -> int:
    """A head of 16 dimensions, and others in proportion (Gemma's global heads)."""
    if value and value == fields.get("qk_rope_head_dim") and "kv_lora_rank" in fields:
        return 8
    stated = fields.get("head_dim")
    if "kv_lora_rank" in fields or not stated:
        return HEAD_DIM
    return max(8, HEAD_DIM * value // stated)


def _rotary(value: Any, fields: dict[str, Any]) -> Any:
    """Sections of M-RoPE in proportion to the head."""
    if isinstance(value, dict):
        return {name: _rotary_field(name, own, fields) for name, own in value.items()}
    return value


def _rotary_field(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return _rotary(value, fields)
    if name in ("mrope_section", "xdrope_section") and isinstance(value, list | tuple):
        rotated = fields.get("qk_rope_head_dim")
        total = sum(value) * 8 // rotated if rotated else sum(value) * HEAD_DIM // _head_dim_of(fields)
        return _parts(list(value), total)
    if name in ("long_factor", "short_factor") and isinstance(value, list):
        return value[: HEAD_DIM // 2]
    return value


def _parts(sizes: list[int], total: int) -> list[int]:
    """``sizes`` in proportion, with ``total`` as their sum."""
    made = [max(1, size * total // sum(sizes)) for size in sizes]
    made[-1] += total - sum(made)
    return made


def _at_most(most: int) -> Rule:
    return lambda value, fields: type(value)(min(value, most)) if value else value


def _fixed(number: Any) -> Rule:
    return lambda value, fields: number if value else value


RULES: list[tuple[re.Pattern[str], Rule]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r".*vocab_size.*", _at_most(VOCABULARY)),
        (r"use_cache", lambda value, fields: True),
        (r"pad_token_id|_pad_token_id", lambda value, fields: 0),
        (r"bos_token_id|decoder_start_token_id|sep_token_id", lambda value, fields: 1),
        (r"eos_token_id|forced_(b|e)os_token_id", lambda value, fields: 2),
        (r"mamba_(n|num)_heads|n_mamba_heads", _at_most(8)),
        (r"mamba_(d_head|head_dim|headdim)|linear_(key_|value_)?head_dim", _at_most(HEAD_DIM)),
        (r"linear_num_key_heads", _at_most(2)),
        (r"linear_num_(value_)?heads", _at_most(4)),
        (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?)(_per_layer)?", _at_most(HEADS)),
        (r"(\w+_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|num_groups)", _kv_heads),
        (r"mamba_d_ssm", _at_most(2 * HIDDEN)),
        (r"(\w+_)?(d_state|state_size)", _at_most(8)),
        (r"(mamba_)?n_groups|mamba_ngroups", _at_most(2)),
        (r"(mamba_)?chunk_size|attention_chunk_size|keep_window_size", _at_most(WINDOW)),
        (r"sliding_window(_size)?|local_attention|attention_window_size|window_size", _at_most(WINDOW)),
        (r"qk_nope_head_dim|v_head_dim|index_head_dim", _at_most(HEAD_DIM)),
        (r"qk_rope_head_dim", _at_most(8)),
        (r"qk_head_dim", _at_most(24)),
        (r"(\w+_)?(head_dim|d_kv|kv_channels)", _head_dim),
        (r"query_pre_attn_scalar", _at_most(HEAD_DIM)),
        (r"rotary_dim", lambda value, fields: max(4, value * HEAD_DIM // _head_dim_of(fields))),
        (r"rope_parameters|rope_scaling", _rotary),
        (r"attention_hidden_size", _at_most(2 * HIDDEN)),
        (r"attention_head_dim", _at_most(2 * HIDDEN // HEADS)),
        (r"q_lora_rank|o_lora_rank", _at_most(32)),
        (r"kv_lora_rank", _at_most(16)),
        (r"\w*_rank", _at_most(4)),
        (r"\w*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", _at_most(4)),
        (r"\w*(per_tok|per_token|moe_topk|moe_top_k|moe_k|top_k_experts)", _at_most(2)),
        (r"n_group|topk_group|num_expert_group", _at_most(1)),
        (r"(moe|shared|expert)\w*(intermediate|hidden|ffn)\w*size|expert_dim|share_expert_dim", _at_most(32)),
        (r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|feed_forward_size", _at_most(96)),
        (r"hidden_size_per_layer_input", _at_most(8)),
        (r"hidden_size|d_model|n_embd|(word_)?embed(ding)?(_proj)?_(dim|size)|emb_dim|hidden_dim", _at_most(HIDDEN)),
        (r"lru_width|backbone_hidden_size", _at_most(HIDDEN)),
        (r"index_n_heads", _at_most(2)),
        (r"index_topk", _at_most(WINDOW)),
        (r"num_kv_shared_layers", _at_most(2)),
        (r"attn_layer_period|expert_layer_period|full_attention_interval|layer_group_size", _at_most(2)),
        (r"global_attn_every_n_layers|no_rope_layer_interval|_?sliding_window_pattern", _at_most(2)),
        (r"attn_layer_offset|expert_layer_offset|first_k_dense_replace|num_dense_layers", _at_most(1)),
        (r"initializer_range|init_std", lambda value, fields: 0.2 if value > 1e-4 else value),
        (r"max_position_embeddings|n_positions", _at_most(4096)),
    )
]


def _few_layers(
    config: PreTrainedConfig, fields: dict[str, Any], least: int = LEAST_LAYERS, most: int = MOST_LAYERS
) -> dict[str, Any]:
    """Fields for few layers, of each kind that the default has, in the order of the default."""
    counts = {name: value for name, value in fields.items() if _LAYERS.fullmatch(name) and type(value) is int}
    made = dict(fields)
    total = getattr(config, "num_hidden_layers", None) or max(counts.values(), default=0)
    if type(total) is not int or total <= least:
        return made
    lists = {name: list(value) for name, value in fields.items() if _is_per_layer(value, total)}
    indices = {name: list(value) for name, value in fields.items() if name not in lists and _is_index(value, total)}
    single = {int(layer): own for layer, own in (fields.get("per_layer_config") or {}).items()}
    kinds = [
        (
            *(repr(value[layer]) for value in lists.values()),
            *(layer in value for value in indices.values()),
            repr(single.get(layer)),
        )
        for layer in range(total)
    ]
    kept = _of_each_kind(kinds, least, most)
    made.update({name: min(value, len(kept)) for name, value in counts.items()})
    made.update({name: [value[layer] for layer in kept] for name, value in lists.items()})
    made.update({name: [new for new, old in enumerate(kept) if old in value] for name, value in indices.items()})
    if single:
        made["per_layer_config"] = {
            new: {name: _small(name, value, fields) for name, value in single[old].items()}
            for new, old in enumerate(kept)
            if old in single
        }
    return made


def _is_per_layer(value: Any, total: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == total and total > 2


def _is_index(value: Any, total: int) -> bool:
    """Whether a value lists numbers of layers: ascending, and at least one."""
    if not isinstance(value, list | tuple) or not value or not all(type(one) is int for one in value):
        return False
    return list(value) == sorted(set(value)) and value[0] >= 0 and value[-1] < total


def _of_each_kind(kinds: list[Any], least: int, most: int) -> list[int]:
    """Numbers of layers, ascending: the first of every kind, then the second of every kind, until there are enough."""
    seen: dict[Any, list[int]] = {}
    for layer, kind in enumerate(kinds):
        seen.setdefault(kind, []).append(layer)
    rounds: Iterator[int] = (
        layers[turn] for turn in range(len(kinds)) for layers in seen.values() if turn < len(layers)
    )
    count = max(least, min(len(seen), most))
    return sorted(layer for layer, _ in zip(rounds, range(count), strict=False))
