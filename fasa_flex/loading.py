"""One way to load a model and its tokenizer, for every command that takes a model's name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    pretrained: str,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        pretrained: a folder or a Hub repository.
        gguf_file: the file of it that holds weights and tokenizer in GGUF.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"float32"``; None: as they were saved.
        device: where the model goes; None: the GPU if there is one.

    Raises:
        ValueError: there is no such model, with the library's reason.
    """
    source: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, **source)
        model = AutoModelForCausalLM.from_pretrained(pretrained, dtype="auto" if dtype is None else dtype, **source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"no model can be loaded from {pretrained} ({reason}); pass the folder or repository of a causal language "
            "model with its tokenizer."
        ) from error
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return model.to(chosen).eval(), tokenizer
