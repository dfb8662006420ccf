"""The script that evaluates a real model, on a tiny random one: what it measures, keeps, adds and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evals.quality import real
from fasa_flex import FasaConfig
from fasa_flex.lm_eval.haystack import heldout_text

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("model")
    text = heldout_text()[:200_000]
    (folder / "read.txt").write_text(text[:120_000])
    (folder / "learnt.txt").write_text(text[80_000:])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text[:50_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the script with these arms, and read what it wrote."""

    def run(*arms: str, **options: object) -> dict[str, Any]:
        given = {
            "pretrained": folder,
            "text": folder / "read.txt",
            "calibrate": folder / "learnt.txt",
            "out": tmp_path / "results.json",
            "profile": tmp_path / "profile",
            "windows": 1,
            "length": 300,
            "tail": 16,
            "prompts": 1,
            "lengths": "300",
            "calibration-length": 320,
            **options,
        }
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(real, "FIRST_TOKEN", 1_000)
        monkeypatch.setattr(sys, "argv", ["real.py", *words, *(word for arm in arms for word in ("--arm", arm))])
        real.main()
        return json.loads((tmp_path / "results.json").read_text())

    return run


@pytest.mark.slow
def test_results_grow_by_documents_and_arms(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = run("fasa 1.0", "fasa 16", "paper 16")
    window, found = made["windows"]["300/0"], made["needles"]["300/0"]
    assert window.keys() == found.keys() == {"dense", "fasa 1.0", "fasa 16", "paper 16"}
    assert window["fasa 1.0"] == pytest.approx(window["dense"], abs=1e-5)
    assert len({round(loss, 5) for loss in window.values()}) == 3
    assert made["arms"]["paper 16"]["config"] == json.loads(json.dumps(FasaConfig.paper(n_fac=16).to_dict()))
    assert 0 < made["bytes_read_share"]["fasa 16 @ 300"] < made["bytes_read_share"]["fasa 1.0 @ 300"]
    assert str(tmp_path) not in json.dumps(made)
    asked = []
    tail = real.Evaluation._tail

    def watched(self: Any, arm: str, document: real.Document, *args: Any) -> float:
        asked.append((document.kind, document.name, arm))
        return tail(self, arm, document, *args)

    monkeypatch.setattr(real.Evaluation, "_tail", watched)
    oracle = "oracle 16 completion=none"
    more = run("fasa 16", oracle, windows=2)
    new = [("windows", "300/1", arm) for arm in ("dense", "fasa 16", oracle)]
    assert sorted(asked) == sorted([*new, ("windows", "300/0", oracle), ("needles", "300/0", oracle)])
    assert more["windows"]["300/0"].items() >= window.items()
    assert more["arms"].keys() == {*made["arms"], oracle}
    with pytest.raises(SystemExit, match="results of another window"):
        run("fasa 16", tail=12)
    monkeypatch.setattr(FasaConfig, "paper", FasaConfig)
    with pytest.raises(SystemExit, match="'paper 16' with other options or defaults"):
        run("paper 16")


def test_a_summary_pairs_arms_with_dense() -> None:
    results = {
        "arms": {"dense": None, "fasa 16": {}},
        "windows": {"300/0": {"dense": 1.0, "fasa 16": 1.1}, "300/1": {"dense": 2.0, "fasa 16": 2.1}, "300/2": {}},
        "needles": {"512/0": {"dense": True, "fasa 16": False}, "256/0": {"dense": True}},
    }
    dense, fasa = real.summary(results)
    assert "ppl x1.0000" in dense
    assert "256: 1/1  512: 1/1" in dense
    assert "ppl x1.1052 +-0.0000 (2)" in fasa
    assert "512: 0/1" in fasa
