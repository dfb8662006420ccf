"""A sample of the sweep: twelve classes, the same ones in every release that has them, through the quick matrix."""

from __future__ import annotations

import hashlib

import pytest
import torch
import transformers
from sentences import raises_sentence
from sweep import build, matrix

from fasa_flex import enable
from fasa_flex.model import handle

SAMPLE = sorted(build.class_names(), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:12]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_works_or_is_refused_in_a_sentence(name: str) -> None:
    record = matrix.examine(name, quick=True)
    assert record["status"] in ("works", "dense", "no text", "refused", "not built"), record["reason"]
    assert record["status"] == "works" or record["reason"] or record["dense"]


def test_the_sweep_notices_a_raw_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("full_attention")

    monkeypatch.setattr(matrix, "enable", broken)
    record = matrix.examine("LlamaForCausalLM", quick=True)
    assert record["status"] == "raw"
    assert "KeyError" in record["reason"]


def test_the_sweep_takes_no_error_of_python_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "attention_shape", lambda model: range(5))
    record = matrix.examine("LlamaForCausalLM", quick=True)
    assert (record["status"], "too many values to unpack" in record["reason"]) == ("raw", True)


def test_the_sweep_notices_a_model_that_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaving(model: torch.nn.Module, *args: object, **kwargs: object) -> None:
        model.model.layers[0].register_forward_pre_hook(lambda module, inputs: None)
        raise ValueError("no; use another model.")

    monkeypatch.setattr(matrix, "enable", leaving)
    record = matrix.examine("LlamaForCausalLM", quick=True)
    assert (record["status"], record["reason"]) == ("raw", "changes ['hooks'] of the model")


def test_the_sweep_notices_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BACKENDS", ("gather", "gather"))
    assert matrix.examine("LlamaForCausalLM", quick=True)["status"] == "works"
    found = matrix.FasaConfig
    monkeypatch.setattr(matrix, "FasaConfig", lambda **fields: found(**{**fields, "n_fac": min(fields["n_fac"], 12)}))
    assert "sparse queries at a full budget" in matrix.examine("LlamaForCausalLM", quick=True)["reason"]


def test_a_class_that_is_wrong_for_its_process_does_not_end_the_others() -> None:
    record = matrix.examine("NoSuchClassForCausalLM")
    assert (record["status"], record["seconds"] < 5) == ("not built", True)


@pytest.mark.parametrize("name", ["DiffLlamaForCausalLM", "BigBirdForCausalLM"])
def test_a_structure_that_is_not_served_is_refused(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = build.build(name)
    with raises_sentence(ValueError, match=r"no layer that FASA can serve|no layer_idx"):
        enable(model)
