"""One way to load a model and its tokenizer, for every command that takes a model's name."""

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
    """What is wrong with a GGUF file, or with what reads it."""


@contextmanager
def explained_gguf(pretrained: str, gguf_file: str | None, revision: str | None = None) -> Iterator[None]:
    """Load from a GGUF file inside: what is wrong with the file is said in one sentence, other errors go on.

    Args:
        pretrained: a folder or a Hub repository.
        gguf_file: the file of it; None: nothing is asked.
        revision: of the repository.

    Raises:
        GGUFError: no package `gguf`, no such file, or one that is no GGUF or is damaged.
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
    except Exception as error:  # a damaged file fails anywhere in transformers, with any error
        reason = _damage(path)
        if reason is None:
            raise
        raise GGUFError(f"{path} is damaged or incomplete ({reason}); fetch it again.") from error


def check_gguf_tokenizer(model_type: str, gguf_file: str | None) -> None:
    """Refuse a tokenizer that transformers reads wrongly from GGUF: release 5.17 leaves out the merges of Gemma's.

    Text then has about twice as many tokens, and dense perplexity doubles (Gemma 3 270M: 27 to 60).

    Args:
        model_type: of the model's config.
        gguf_file: that the tokenizer was read from; None: it was not.

    Raises:
        GGUFError: it is such a one.
    """
    release = tuple(map(int, transformers_version.split(".")[:2]))
    if gguf_file is not None and model_type.startswith("gemma") and release < _GEMMA_MERGES:
        raise GGUFError(
            f"transformers {transformers_version} reads the tokenizer of {gguf_file} without its merges; "
            "install transformers 5.18 or newer."
        )


def _damage(path: Path) -> str | None:
    """Why the package `gguf` cannot read the file; None if it can. It takes seconds."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:  # numpy's, of whatever kind
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
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        pretrained: a folder or a Hub repository.
        gguf_file: the file of it that holds weights and tokenizer in GGUF.
        tokenizer: a folder or repository of the tokenizer; None: the model's own.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"float32"``; None: as they were saved.
        device: where the model goes; None: the GPU if there is one.

    Raises:
        ValueError: there is no such model, with the library's reason, or GGUF that cannot be read.
    """
    source: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    kept = "auto" if dtype is None else dtype
    try:
        with explained_gguf(pretrained, gguf_file):
            words = AutoTokenizer.from_pretrained(tokenizer or pretrained, **({} if tokenizer else source))
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=kept, **source)
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
    return model.to(chosen).eval(), words
