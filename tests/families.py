"""Every family of the support matrix at toy size: random float32 models, seeded, with sharp attention."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LAYERS, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 3, 4, 2, 64, 512
WINDOW = 16


@dataclass(frozen=True)
class Family:
    """One architecture at toy size.

    Attributes:
        name: as its users say it.
        layout: which two dimensions form plane i: half_split or interleaved.
        cls: prefix of transformers' classes; None is the name.
        rotary_dim: None: the whole head rotates.
        offset: dimensions of a head before those that rotate.
        sparse: layers that are sparse where ``dense_layers=(0,)``.
        note: which of its layers are sparse, in words.
        fields: of its config, beyond the common ones.
    """

    name: str
    layout: str = "half_split"
    cls: str | None = None
    head_dim: int = 16
    rotary_dim: int | None = None
    offset: int = 0
    sparse: tuple[int, ...] = (1, 2)
    note: str = "all"
    fields: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def pairs(self) -> list[list[int]]:
        """The two dimensions of every chunk: the planes, then what does not rotate, two by two."""
        start, count = self.offset, (self.rotary_dim or self.head_dim) // 2
        if self.layout == "interleaved":
            planes = [[start + 2 * i, start + 2 * i + 1] for i in range(count)]
        else:
            planes = [[start + i, start + i + count] for i in range(count)]
        rest = [dim for dim in range(self.head_dim) if not start <= dim < start + 2 * count]
        return planes + [[rest[i], rest[i + 1]] for i in range(0, len(rest), 2)]


def _longrope(dim: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(dim // 2)],
        "long_factor": [1.0 + 0.3 * i for i in range(dim // 2)],
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": LAYERS,
    "n_group": 1,
    "topk_group": 1,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_PARTIAL = {"head_dim": 16, "partial_rotary_factor": 0.5}

FAMILIES = {
    family.name: family
    for family in (
        Family("Llama"),
        Family("Llama 3 (scaled RoPE)", cls="Llama", fields={"rope_parameters": _LLAMA3}),
        Family("Mistral", fields={"sliding_window": None}),
        Family(
            "Mistral (sliding window)",
            cls="Mistral",
            sparse=(),
            note="none: windows everywhere",
            fields={"sliding_window": WINDOW},
        ),
        Family("Mixtral", fields={"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
        Family("Qwen2"),
        Family("Qwen3", head_dim=32, fields={"head_dim": 32}),
        Family("Qwen3-MoE", cls="Qwen3Moe", fields={"head_dim": 16, "num_experts": 4, **_EXPERTS}),
        Family(
            "Gemma 2",
            cls="Gemma2",
            sparse=(1,),
            note="without a window",
            fields={**_GEMMA, "attn_logit_softcapping": 20.0},
        ),
        Family(
            "Gemma 3",
            cls="Gemma3",
            sparse=(1,),
            note="without a window",
            fields={**_GEMMA, "layer_types": _ALTERNATING},
        ),
        Family("Phi-3 (long RoPE)", cls="Phi3", fields={"rope_parameters": _longrope(16)}),
        Family("GLM-4", "interleaved", cls="Glm4", rotary_dim=8, fields=_PARTIAL),
        Family("GLM", "interleaved", cls="Glm", rotary_dim=8, fields=_PARTIAL),
        Family("Cohere", "interleaved"),
        Family(
            "Cohere2",
            "interleaved",
            sparse=(1,),
            note="without a window",
            fields={"sliding_window": WINDOW, "layer_types": _ALTERNATING},
        ),
        Family("SmolLM3 (layers without RoPE)", cls="SmolLM3", fields={"no_rope_layers": [1, 1, 0]}),
        Family("GPT-NeoX", cls="GPTNeoX", rotary_dim=4, fields={"num_key_value_heads": None, "rotary_pct": 0.25}),
        Family("StableLM", cls="StableLm", rotary_dim=8, fields={"partial_rotary_factor": 0.5}),
        Family("OLMo 2", cls="Olmo2"),
        Family(
            "gpt-oss",
            cls="GptOss",
            sparse=(1,),
            note="without a window",
            fields={
                "head_dim": 16,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "sliding_window": WINDOW,
                "layer_types": _ALTERNATING,
            },
        ),
        Family("DeepSeek-V2 (MLA)", "interleaved", cls="DeepseekV2", head_dim=24, rotary_dim=8, offset=16, fields=_MLA),
        Family("DeepSeek-V3 (MLA)", cls="DeepseekV3", head_dim=24, rotary_dim=8, offset=16, fields=_MLA),
    )
}


def tiny(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model, float32, with weights large enough that attention is far from uniform.

    Args:
        name: of a family, or the prefix of another one's classes.
        seed: of the weights.
        changes: fields of the config.
    """
    torch.manual_seed(seed)
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, eos_token_id=None
        )
        return transformers.GPT2LMHeadModel(config).eval()
    family = FAMILIES.get(name) or Family(name)
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    fields = {**common, **family.fields, **changes}
    if fields["num_key_value_heads"] is None:
        del fields["num_key_value_heads"]
    prefix = family.cls or name
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**fields)).eval()
    model.generation_config.eos_token_id = None
    if fields.get("attn_logit_softcapping") or prefix == "GptOss":
        model.set_attn_implementation("eager")  # what recent releases choose by themselves
    for name_, parameter in model.named_parameters():
        if name_.endswith("sinks"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words "w3" ... "w63" with their own numbers as ids; 0 pads, 1 begins, 2 is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
