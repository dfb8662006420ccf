"""Small models written as GGUF, weights in float32, with the byte-level tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Llama or GPT-2 as llama.cpp's converter does.

    Args:
        path: The file.
        model: In float32, with a vocabulary of the tokenizer's size.
        tokenizer: Byte-level BPE.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "llama":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pieces["vocab"], key=pieces["vocab"].get))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(pieces["vocab"]))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in pieces["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, weights in model.state_dict().items():
        whole, _, kind = name.rpartition(".")
        if "rotary" in name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(whole.rpartition(".")[2])
        if heads is not None:
            weights = _interleaved(weights, getattr(config, heads))
        if config.model_type == "gpt2" and weights.dim() == 2 and ".h." in name:
            weights = weights.T.contiguous()
        writer.add_tensor(f"{names.get_name(whole)}.{kind}", weights.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weights: Tensor, heads: int) -> Tensor:
    """GGUF's order of a Llama's query and key dimensions: the two of a plane side by side."""
    return weights.view(heads, 2, -1, weights.shape[-1]).transpose(1, 2).reshape(weights.shape).contiguous()
