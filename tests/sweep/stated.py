"""Fields that small configs need besides their class's own defaults: what the defaults leave out or contradict."""

from __future__ import annotations

from typing import Any

_SIZED_HEADS = {"head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}

_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
    "indexer_compress_ratio": 4,
}

_HALF = {"partial_rotary_factor": 0.5}


def _sections(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


BEFORE: dict[str, dict[str, Any]] = {
    "Gemma4AssistantConfig": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
    },
    "Lfm2MoeConfig": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
}
"""Arguments without which the default config itself cannot be made, or says nothing of its layers; by config class."""

STATED: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "AyaVisionForConditionalGeneration": {"vision_config.num_attention_heads": 16},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 60}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "CohereCompassForConditionalGeneration": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "DoryForCausalLM": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "DeepseekV2ForCausalLM": _EXPERTS,
    "Dots1ForCausalLM": _EXPERTS,
    "Dots3NoteForCausalLM": {"num_attention_heads": 2},
    "Dots3NoteForConditionalGeneration": {"text_config.num_attention_heads": 2},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "FunAsrNanoForConditionalGeneration": {
        "adaptor_config.hidden_size": 64,
        "adaptor_config.num_attention_heads": 4,
        "adaptor_config.intermediate_size": 16,
    },
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "KyutaiSpeechToTextForConditionalGeneration": {"audio_pad_token_id": 69},
    "Molmo2ForConditionalGeneration": {"adapter_config.vision_feature_layer": [1, 0]},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 60}},
    "Glm46VForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "Glm4vForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "Glm4vMoeForConditionalGeneration": {"text_config.rope_parameters": {**_sections([1, 1, 2]), **_HALF}},
    "GlmOcrForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "HrmTextForCausalLM": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "HunYuanDenseV1ForCausalLM": _SIZED_HEADS,
    "HunYuanMoEV1ForCausalLM": _SIZED_HEADS,
    "HunYuanVLForConditionalGeneration": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
    },
    "JetMoeForCausalLM": {"num_key_value_heads": 2},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 4},
    "Lfm2VlForConditionalGeneration": {"text_config.layer_types": ["conv", "full_attention"] * 4},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "hidden_size": 64},
    "MinistralForCausalLM": _SIZED_HEADS,
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "PaddleOCRVLForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config.rope_parameters": _sections([2, 3, 3]),
        "vision_start_token_id": 62,
    },
    "Qwen2_5_VLForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "Qwen2VLForConditionalGeneration": {"text_config.rope_parameters": _sections([2, 3, 3])},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 62},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 16},
    "XLNetLMHeadModel": {"d_head": 16},
}
"""Fields set after shrinking, by model class; a dot leads into a config within the config."""
