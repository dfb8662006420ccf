"""Model shapes by name, which decide the bytes and operations of a decode step; weights are random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.provenance import Provenance
from fasa_flex.calibration.rotary import RotaryLayout


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's config.

    Attributes:
        name: key in `SHAPES`.
        layers: transformer layers of the whole model.
        hidden: width of the residual stream.
        query_heads: query heads, a multiple of ``kv_heads``.
        kv_heads: key/value heads.
        head_dim: dimensions of a head.
        intermediate: width of the MLP.
        vocabulary: tokens of the vocabulary.
        tied: whether the output head shares the embedding's weights.
        family: ``Llama`` or ``Qwen2``, the architecture in transformers.
    """

    name: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    family: str = "Llama"

    def layer_parameters(self) -> int:
        """Number of weights of one layer, without biases and norms."""
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def head_parameters(self) -> int:
        """Number of weights of embedding and output head in memory."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def read_parameters(self, layers: int) -> int:
        """Number of weights that a decode step of ``layers`` layers reads: of the layers and the output head."""
        return layers * self.layer_parameters() + self.vocabulary * self.hidden

    def model(self, layers: int, positions: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """A model of this shape with random weights, ``layers`` layers and ``positions`` positions."""
        fields: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        config_class, model_class = _FAMILIES[self.family]
        if self.family == "Llama":
            fields["head_dim"] = self.head_dim
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                model: PreTrainedModel = model_class(config_class(**fields))
        finally:
            torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        Shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, family="Qwen2"),
        Shape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),  # as many KV heads as query heads
        Shape("tiny", 2, 64, 4, 2, 16, 96, 256),
    )
}
"""Shapes by name; ``llama-2-7b`` has no grouped queries, ``tiny`` is for tests."""


def random_chunks(shape: Shape, n_tip: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random dominant chunks of one layer, int64 [Hkv, n_tip, 2]; times do not depend on which ones."""
    generator = torch.Generator().manual_seed(seed)
    planes = RotaryLayout.half_split(shape.head_dim).chunks
    picked = [torch.randperm(len(planes), generator=generator)[:n_tip].sort().values for _ in range(shape.kv_heads)]
    return planes[torch.stack(picked)].to(device)


def random_profile(shape: Shape, model: PreTrainedModel, layers: int) -> FasaProfile:
    """A random profile that fits ``model``; times do not depend on its contents."""
    table = torch.rand(layers, shape.query_heads, shape.head_dim // 2, generator=torch.Generator().manual_seed(0))
    provenance = Provenance.of(model, top_k=1, max_new_tokens=1, queries=1)
    provenance = replace(provenance, model_id=f"random weights of shape {shape.name}")
    return FasaProfile(table, RotaryLayout.half_split(shape.head_dim), provenance)
