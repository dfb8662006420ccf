"""Errors have the type that Python has for them, and are ValueErrors too, which callers of version 0.1 catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sentences import raises_sentence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fasa_flex import FasaConfig, RotaryLayout, calibrate, enable
from fasa_flex.bench.settings import Settings
from fasa_flex.lm_eval.arguments import check_parallel, folder_or_profile, layer_set


def without_rope() -> RotaryLayout:
    return RotaryLayout.detect(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)))


def on_a_gpu() -> Settings:
    settings = Settings(torch.device("cpu"), torch.float32, ("tiny",), (64,), (1,))
    return replace(settings, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("expected", "call", "sentence"),
    [
        (TypeError, lambda: layer_set(0.1), r"dense_layers=0\.1 is not a set"),  # type: ignore[arg-type]
        (TypeError, lambda: folder_or_profile(1.5), "profile=1.5 is no profile"),
        (ValueError, lambda: check_parallel("auto", loads=False), "tp_plan='auto' shards a model while it is loaded"),
        (NotImplementedError, without_rope, r"\(no RoPE, .*\), so it has no frequency chunks"),
        pytest.param(
            RuntimeError,
            on_a_gpu,
            "no CUDA device is available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_types_of_errors(expected: type[Exception], call: Callable[[], object], sentence: str) -> None:
    for kind in (expected, ValueError):
        with raises_sentence(kind, match=sentence):
            call()


def test_types_of_errors_of_a_model(llama: PreTrainedModel) -> None:
    for kind in (TypeError, ValueError):
        with raises_sentence(kind, match="profile must be a FasaProfile, got 'folder'"):
            enable(llama, "folder", FasaConfig())  # type: ignore[arg-type]
        with raises_sentence(kind, match="a sample must be a text or a 1-D LongTensor"):
            calibrate(llama, [torch.ones(2, 40)], top_k=8, progress=False)
