"""Loading of a model and its tokenizer, for all commands that take the name of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils import cached_file, is_gguf_available

_MAGIC = b"GGUF"
_GEMMA_MERGES = (5, 18)
"""The first release of transformers that reads the merges of a Gemma tokenizer from GGUF."""


class GGUFError(ValueError):
    """A GGUF file or the package `gguf` is missing, damaged or unsuitable; the message says which."""


@contextmanager
def explained_gguf(pretrained: str, gguf_file: str | None, revision: str | None = None) -> Iterator[None]:
    """Context for loading from a GGUF file: explains errors of the file in one sentence, and passes on other errors.

    Args:
        pretrained: a folder or a Hub repository.
        gguf_file: name of the GGUF file in it; None: the context does nothing.
        revision: revision of the repository.

    Raises:
        GGUFError: the package `gguf` or the file is missing, or the file is damaged or is not GGUF.
    """
    if gguf_file is None:
        yield
        return
    if not is_gguf_available():
        raise GGUFError(
            f"{gguf_file} is read by the package gguf, which is missing or too old; pip install 'fasa-flex[gguf]'."
        )
    try:
        path = Path(str(cached_file(pretrained, gguf_file, revision=revision)))
    except OSError as error:
        raise GGUFError(
            f"{pretrained} holds no file {gguf_file} ({' '.join(str(error).split()).rstrip('.')}); "
            "pass gguf_file=, the name of a file in that folder or repository."
        ) from error
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise GGUFError(f"{path} is no GGUF file; pass one that was exported for llama.cpp.")
    try:
        yield
    except Exception as error:  # a damaged file can raise any error anywhere in transformers
        reason = _damage(path)
        if reason is None:
            raise
        raise GGUFError(f"{path} is damaged or incomplete ({reason}); fetch it again.") from error


def check_gguf_tokenizer(model_type: str, gguf_file: str | None) -> None:
    """Refuse Gemma's tokenizer from GGUF in transformers 5.17, which ignores its merges.

    Text then has about twice as many tokens.

    Args:
        model_type: model type in the config.
        gguf_file: file that the tokenizer was read from; None: it was not read from GGUF.

    Raises:
        GGUFError: the tokenizer was read without its merges.
    """
    release = tuple(map(int, transformers_version.split(".")[:2]))
    if gguf_file is not None and model_type.startswith("gemma") and release < _GEMMA_MERGES:
        raise GGUFError(
            f"transformers {transformers_version} reads the tokenizer of {gguf_file} without its merges; "
            "install transformers 5.18 or newer."
        )


def _damage(path: Path) -> str | None:
    """Return the reason why the package `gguf` cannot read the file, or None if it can; takes seconds."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:  # numpy raises various kinds
        return " ".join(str(error).split()).rstrip(".")
    return None


def load_model(
    pretrained: str,
    *,
    gguf_file: str | None = None,
    tokenizer: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        pretrained: a folder or a Hub repository.
        gguf_file: name of a file in it with weights and tokenizer in GGUF; None: other formats.
        tokenizer: folder or repository of the tokenizer; None: the model's own.
        dtype: dtype of the weights, such as ``torch.bfloat16`` or ``"float32"``; None: the saved dtype.
        device: device of the model; None: the GPU if there is one.

    Raises:
        ValueError: the model or its GGUF file cannot be loaded; the message gives the library's reason.
    """
    source: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    weights_dtype = "auto" if dtype is None else dtype
    try:
        with explained_gguf(pretrained, gguf_file):
            loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained, **({} if tokenizer else source))
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=weights_dtype, **source)
        if tokenizer is None:
            check_gguf_tokenizer(model.config.get_text_config().model_type, gguf_file)
    except GGUFError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"no model can be loaded from {pretrained} ({reason}); pass the folder or repository of a causal language "
            "model with its tokenizer."
        ) from error
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return model.to(chosen).eval(), loaded_tokenizer
