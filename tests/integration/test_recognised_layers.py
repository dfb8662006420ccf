"""Layers are known by what they do in a probing forward: others than FASA can serve stay dense, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from generation import Ids
from sentences import raises_sentence
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, RotaryLayout, calibrate, enable

CONFIG = FasaConfig(n_fac=16, n_tip=2, dense_layers=())
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
FOUR = {**TEXT, "num_hidden_layers": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "Llava",
        "ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
    ),
    "gemma3": (
        "Gemma3",
        "ForConditionalGeneration",
        {
            "text_config": {
                **{**TEXT, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16},
                "layer_types": [*ALTERNATING, "full_attention"],
            },
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
        },
    ),
    "qwen2_audio": (
        "Qwen2Audio",
        "ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": {
                **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
                **{"num_mel_bins": 8, "max_source_positions": 16},
            },
            "audio_token_index": 60,
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        "ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
            **{"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63},
        },
    ),
    "cwm": ("Cwm", "ForCausalLM", {**TEXT, "head_dim": 16}),
    "mllama": (
        "Mllama",
        "ForConditionalGeneration",
        {
            "text_config": {
                **{**FOUR, "model_type": "mllama_text_model", "cross_attention_layers": [1]},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1},
                **{"attention_heads": 2, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0]},
                **{"vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
            },
        },
    ),
    "gemma3n": (
        "Gemma3n",
        "ForCausalLM",
        {
            **{**FOUR, "intermediate_size": [96] * 4, "head_dim": 16, "sliding_window": 16},
            **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
            **{"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
            "layer_types": ALTERNATING * 2,
        },
    ),
    "csm": (
        "Csm",
        "ForConditionalGeneration",
        {
            **{**TEXT, "num_codebooks": 3, "text_vocab_size": 64, "head_dim": 16},
            "depth_decoder_config": {**TEXT, "num_codebooks": 3, "backbone_hidden_size": 64, "head_dim": 16},
        },
    ),
    "jetmoe": (
        "JetMoe",
        "ForCausalLM",
        {
            **{name: value for name, value in TEXT.items() if name != "num_attention_heads"},
            **{"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        },
    ),
    "hrm": ("HrmText", "ForCausalLM", TEXT),
    "gemma4": (
        "Gemma4",
        "ForCausalLM",
        {
            **{**FOUR, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "layer_types": ALTERNATING * 2},
        },
    ),
    "t5gemma": (
        "T5Gemma",
        "ForConditionalGeneration",
        {
            "encoder": {**TEXT, "model_type": "t5_gemma_module", "head_dim": 16},
            "decoder": {**TEXT, "model_type": "t5_gemma_module", "head_dim": 16, "cross_attention_hidden_size": 64},
            "vocab_size": 64,
        },
    ),
    "glm_moe_dsa": ("GlmMoeDsa", "ForCausalLM", {**TEXT, "num_key_value_heads": 4, **EXPERTS, **MLA, **INDEXER}),
    "doge": ("Doge", "ForCausalLM", {**TEXT, "head_dim": 16}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    prefix, suffix, fields = MODELS[name]
    if not hasattr(transformers, prefix + suffix):
        pytest.skip(f"this transformers has no {prefix}{suffix} yet")
    text_only = prefix in ("Gemma3n", "Gemma4")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{prefix}{'Text' if text_only else ''}Config")(**fields)
        model: PreTrainedModel = getattr(transformers, prefix + suffix)(config).eval().to(dtype)
    model.generation_config.eos_token_id = None
    return model


SERVED: dict[str, tuple[list[int], dict[int, str]]] = {
    "llava": ([0, 1, 2], {}),
    "gemma3": ([1, 2], {0: "sliding window"}),
    "qwen2_audio": ([0, 1, 2], {}),
    "qwen2_vl": ([0, 1, 2], {}),
    "cwm": ([0], {1: "sliding window", 2: "sliding window"}),
    "mllama": ([0, 2, 3], {1: "cross-attention"}),
    "gemma3n": ([1], {0: "sliding window", 2: "another layer's", 3: "another layer's"}),
    "csm": ([0, 1, 2], {}),
    "gemma4": ([1, 3], {0: "sliding window", 2: "sliding window"}),
}
LAYOUTS = {"gemma4": RotaryLayout(RotaryLayout.half_split(32).chunks, 4)}
"""Layouts other than planes (i, i + 8) of 16 dimensions: in Gemma 4's layers without a window a quarter of 32 turns."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_what_can_be_served_is_sparse_and_the_rest_is_named(name: str, dtype: torch.dtype, ids: Ids) -> None:
    model, (sparse, dense) = build(name, dtype), SERVED[name]
    assert RotaryLayout.detect(model) == LAYOUTS.get(name, RotaryLayout.half_split(16))
    with enable(model, config=CONFIG) as fasa, torch.no_grad():
        model.generate(ids(160, rows=1), max_new_tokens=3, do_sample=False)
        assert sorted(fasa.dense_layers) == sorted(dense)
        assert all(reason in fasa.dense_layers[layer] for layer, reason in dense.items())
        assert [layer for layer, stats in enumerate(fasa.stats.per_layer) if stats.sparse_queries] == sparse
        assert {stats.sparse_queries for stats in fasa.stats.per_layer} <= {0, 2}
        profile = fasa.profile
    with enable(model, profile, CONFIG) as again:
        assert again.dense_layers == fasa.dense_layers


@pytest.mark.parametrize("name", ["mllama", "gemma3n"])
def test_what_is_not_served_is_not_calibrated(name: str, ids: Ids) -> None:
    profile = calibrate(build(name), [ids(40)], top_k=8, max_new_tokens=2, progress=False)
    assert profile.layout.unserved_layers == {"mllama": (1,), "gemma3n": (2, 3)}[name]
    measured = profile.agreement.flatten(1).any(1).tolist()
    assert measured == [layer not in profile.layout.unserved_layers for layer in range(4)]


REFUSED = {
    "jetmoe": r"4 query heads of 16 dimensions on 4 key heads of 16, where the config states 4 on 2 of 16",
    "hrm": r"passes in one forward",
    "t5gemma": r"is an encoder-decoder",
    "glm_moe_dsa": r"(indexed|deepseek_sparse)_attention, which select or compress their keys by themselves",
    "doge": r"attention mask of shape \(\d+, 4, \d+, \d+\)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_changes(name: str, dtype: torch.dtype, ids: Ids) -> None:
    model = build(name, dtype)
    former = model.config.get_text_config()._attn_implementation
    calls: list[Callable[[], object]] = [
        lambda: calibrate(model, [ids(40)], top_k=8, max_new_tokens=2, progress=False),
        lambda: enable(model, config=CONFIG),
    ]
    for call in calls:
        with raises_sentence(ValueError, match=REFUSED[name]) as error:
            call()
        assert "no RoPE" not in str(error.value)
    assert model.config.get_text_config()._attn_implementation == former


@pytest.mark.parametrize("name", ["Whisper", "Bart"])
def test_a_decoder_taken_from_an_encoder_decoder_is_refused_for_its_positions(name: str) -> None:
    """They are learned; its attention to an encoder, of the same layer numbers, is not what is looked at."""
    sizes = {f"{part}_{of}": 2 for part in ("encoder", "decoder") for of in ("layers", "attention_heads")}
    limit = {"Whisper": "max_target_positions", "Bart": "max_position_embeddings"}[name]
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{name}Config")(vocab_size=64, d_model=32, **sizes, **special, **{limit: 60})
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        enable(getattr(transformers, f"{name}Model")(config).eval())
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    sample = torch.arange(3, 43)
    for call in (lambda: enable(model), lambda: calibrate(model, [sample], top_k=8, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"^the queries of {name}ForCausalLM depend .*absolute positions"):
            call()


def test_a_model_that_continues_no_text_says_so(ids: Ids) -> None:
    with raises_sentence(ValueError, match=r"CsmFor.*does not continue a text.*enable without a profile"):
        calibrate(build("csm"), [ids(40)], top_k=8, max_new_tokens=2, progress=False)
