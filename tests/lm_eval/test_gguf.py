"""``pretrained=FOLDER,gguf_file=FILE``: as the same model in its other form, and bad files in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from sentences import raises_sentence
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.hf.loading import load_model
from fasa_flex.lm_eval import documents
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.lm_eval.model import FasaHFLM
from fasa_flex.lm_eval.report import loaded_as

pytest.importorskip("gguf")
Gguf = tuple[str, str]
Build = Callable[..., list[Instance]]
SETTINGS: dict[str, Any] = {"n_tip": 2, "n_fac": 16, "device": "cpu", "batch_size": 1}


@pytest.mark.parametrize("source", ["folder", "prompt", "auto"])
def test_answers_are_those_of_the_same_model_in_its_other_form(
    checkpoint: Path, profile: Path, gguf_checkpoint: Gguf, requests: Build, tmp_path: Path, source: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(heldout_text()[:1500])
    how: dict[str, Any] = {
        "folder": {"profile": str(profile)},
        "prompt": {"profile": "prompt"},
        "auto": {"profile": "auto", "calibration_source": str(text), "profile_cache": str(tmp_path / "cache")},
    }
    given = {**SETTINGS, **how[source]}
    folder, file = gguf_checkpoint
    asked = requests("loglikelihood", (heldout_text()[2000:3000], heldout_text()[3000:3060]))
    scores = []
    for model in (FasaHFLM(str(checkpoint), **given), FasaHFLM(folder, gguf_file=file, **given)):
        scores.append(model.loglikelihood(asked)[0][0])
        assert model.fasa.stats.sparse_queries > 0
        if source == "auto":  # the weights decide, not their form: the second finds what the first has kept
            assert model.calibration.record is not None
            assert model.calibration.record["cached"] is (len(scores) == 2)
        model.fasa.disable()
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_profile_fits_the_model_in_every_form_and_precision(
    checkpoint: Path, gguf_checkpoint: Gguf, tmp_path: Path
) -> None:
    """config.json may say 10000 where GGUF says 10000.0; profiles of both kinds were made before that was one."""
    folder, file = gguf_checkpoint
    whole, _ = load_model(folder, gguf_file=file, device="cpu")
    shutil.copytree(checkpoint, tmp_path / "whole")
    config = tmp_path / "whole" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10000'))
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert isinstance(native.config.rope_parameters["rope_theta"], int), "the example is weak"
    sample = torch.randint(2, 400, (60,), generator=torch.Generator().manual_seed(1))
    others = [native, native.bfloat16(), AutoModelForCausalLM.from_pretrained(checkpoint)]
    made = calibrate(whole, [sample], top_k=16, max_new_tokens=4, progress=False)
    assert made.provenance.model_id == folder
    for other in others:
        made.check_fits(other)
        back = calibrate(other, [sample], top_k=16, max_new_tokens=4, progress=False)
        back.save_pretrained(tmp_path / "profile")
        FasaProfile.from_pretrained(tmp_path / "profile").check_fits(whole)
        with enable(whole, back, FasaConfig(n_fac=8)) as fasa:
            whole.generate(sample[None], max_new_tokens=3)
            assert fasa.stats.sparse_queries > 0


def test_answers_of_another_file_in_the_folder_are_not_its_own(gguf_checkpoint: Gguf, profile: Path) -> None:
    folder, file = gguf_checkpoint
    assert loaded_as(FasaHFLM(folder, gguf_file=file, profile=str(profile), **SETTINGS))["gguf_file"] == file


def test_packaged_tasks_count_tokens_with_the_tokenizer_of_the_file(gguf_checkpoint: Gguf, checkpoint: Path) -> None:
    folder, file = gguf_checkpoint
    asked = {"num_docs": 2, "max_seq_lengths": [256], "n_facts": 2}
    docs = documents.needle(pretrained=folder, gguf_file=file, **asked)["test"]
    assert docs["prompt"] == documents.needle(pretrained=str(checkpoint), **asked)["test"]["prompt"]
    with pytest.raises(ValueError, match=r"holds no file other\.gguf"):
        documents.needle(pretrained=folder, gguf_file="other.gguf", **asked)


@pytest.fixture
def refused(gguf_checkpoint: Gguf) -> Callable[..., str]:
    """`refused(name, folder)`: the one sentence that `fasa_hf` and `load_model` both say."""

    def say(name: str, folder: str | Path = gguf_checkpoint[0]) -> str:
        said = []
        for load in (
            lambda: FasaHFLM(str(folder), gguf_file=name, profile="prompt", **SETTINGS),
            lambda: load_model(str(folder), gguf_file=name, device="cpu"),
        ):
            with pytest.raises(ValueError, match=r"\.$") as error:
                load()
            said.append(str(error.value))
        assert said[0] == said[1]
        assert "\n" not in said[0]
        return said[0]

    return say


def test_a_missing_package_is_named(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_flex.hf.loading.is_gguf_available", lambda: False)
    assert "pip install 'fasa-flex[gguf]'" in refused("tiny.gguf")


def test_files_that_are_missing_or_no_gguf_or_damaged(
    refused: Callable[..., str], gguf_checkpoint: Gguf, tmp_path: Path
) -> None:
    whole = (Path(gguf_checkpoint[0]) / gguf_checkpoint[1]).read_bytes()
    files = {"no.gguf": b"PK\3\4 an archive", "empty.gguf": b"", "head.gguf": whole[:400], "half.gguf": whole[:-5000]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert "no.gguf is no GGUF file; pass one that" in refused("no.gguf", tmp_path)
    assert "empty.gguf is no GGUF file; pass one that" in refused("empty.gguf", tmp_path)
    assert "head.gguf is damaged or incomplete (" in refused("head.gguf", tmp_path)
    assert "half.gguf is damaged or incomplete (" in refused("half.gguf", tmp_path)
    assert f"{tmp_path} holds no file other.gguf (" in refused("other.gguf", tmp_path)


def test_a_gguf_without_rope_is_refused_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    from gguf_files import write_gguf

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=1024)
    write_gguf(tmp_path / "gpt2.gguf", GPT2LMHeadModel(config), tokenizer)
    with raises_sentence(ValueError, match=r"\(no RoPE, .*; use a model"):
        FasaHFLM(str(tmp_path), gguf_file="gpt2.gguf", profile="prompt", **SETTINGS)
