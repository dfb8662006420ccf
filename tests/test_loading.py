"""Loading a model and its tokenizer by a name."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from sentences import raises_sentence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fasa_flex.hf import loading
from fasa_flex.hf.loading import load_model


def test_a_folder_gives_the_model_and_its_tokenizer(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama.bfloat16().train().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], weights) for name, weights in llama.state_dict().items())
    assert words("w3 w9").input_ids == tokenizer("w3 w9").input_ids
    assert load_model(str(tmp_path), dtype="float32", device="cpu")[0].dtype == torch.float32


def test_the_tokenizer_may_be_in_another_folder(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "words")
    _, words = load_model(str(tmp_path / "model"), tokenizer=str(tmp_path / "words"), device="cpu")
    assert words("w3 w9").input_ids == tokenizer("w3 w9").input_ids


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with raises_sentence(ValueError, match=r"^no model can be loaded from .*; pass the folder .*\.$"):
        load_model(str(tmp_path))


def test_a_gguf_file_that_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """The package is asked for first, where it is missing."""
    with raises_sentence(ValueError, match=r"holds no file model.gguf .*; pass gguf_file|pip install .*gguf"):
        load_model(str(tmp_path), gguf_file="model.gguf")


@pytest.mark.parametrize(
    ("release", "model_type", "gguf_file", "refused"),
    [
        ("5.17.0", "gemma3_text", "model.gguf", True),
        ("5.17.0", "gemma3_text", None, False),
        ("5.17.0", "llama", "model.gguf", False),
        ("5.18.0.dev0", "gemma3_text", "model.gguf", False),
    ],
)
def test_a_tokenizer_that_transformers_reads_wrongly_is_refused(
    release: str, model_type: str, gguf_file: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "transformers_version", release)
    expected = raises_sentence(ValueError, match="5.17.0 reads the tokenizer of model.gguf without its merges")
    with expected if refused else nullcontext():
        loading.check_gguf_tokenizer(model_type, gguf_file)
