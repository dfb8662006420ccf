"""`profile=auto`: calibrated once, found again, and nobody's random numbers are touched."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from sentences import raises_sentence

from fasa_flex.lm_eval import profiles
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.lm_eval.model import FasaHFLM

Load = Callable[..., FasaHFLM]


def state() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_calibrates_once_and_finds_the_profile_again(
    sparse: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state()
    first = sparse(profile="auto", profile_cache=str(tmp_path))
    assert state() == before
    recorded = first.get_model_info()["fasa"]["calibration"]
    assert recorded["name"] == "facts"
    assert recorded["cached"] is False
    assert first.profile.provenance.queries == recorded["samples"] * recorded["steps"]
    monkeypatch.setattr(profiles, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    again = sparse(profile="auto", profile_cache=str(tmp_path))
    assert again.profile.fingerprint == first.profile.fingerprint
    assert again.get_model_info()["fasa"]["calibration"] == {**recorded, "cached": True}


def test_a_cache_that_cannot_be_written_is_refused_before_calibrating(
    sparse: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "calibrate", lambda *_, **__: pytest.fail("calibrated for nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot be written to \(File exists\); choose another folder\.$"):
        sparse(profile="auto", profile_cache=str(tmp_path / "file"))


def test_a_profile_that_was_begun_is_no_profile(sparse: Load, tmp_path: Path) -> None:
    """A folder without config.json is what an interrupted calibration may leave."""
    first = sparse(profile="auto", profile_cache=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    (folder / "config.json").unlink()
    again = sparse(profile="auto", profile_cache=str(tmp_path))
    assert again.calibration.record == {**first.calibration.record, "cached": False}
    assert torch.equal(again.profile.agreement, first.profile.agreement)


def test_other_weights_sources_and_formats_are_calibrated_anew(
    sparse: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = sparse()
    lm.fasa.disable()
    text = tmp_path / "source.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    lengths = {"steps": 64, "samples": 1, "name": str(text)}
    cache = tmp_path / "profiles"
    profile, recorded = profiles.auto_profile(lm.model, lm.tokenizer, str(text), 768, cache)
    assert lengths.items() <= recorded.items()
    assert recorded["length"] <= 768 - 64
    profiles.auto_profile(lm.model, lm.tokenizer, "facts", 768, cache)
    with torch.no_grad():
        lm.model.model.layers[1].self_attn.q_proj.weight.add_(0.01)
    other, _ = profiles.auto_profile(lm.model, lm.tokenizer, str(text), 768, cache)
    assert len([folder for folder in cache.iterdir() if not folder.name.startswith(".")]) == 3
    assert other.fingerprint != profile.fingerprint
    monkeypatch.setattr(profiles, "FORMAT", profiles.FORMAT + 1)  # what an older version kept holds less
    assert profiles.auto_profile(lm.model, lm.tokenizer, str(text), 768, cache)[1]["cached"] is False


def test_without_a_profile_it_calibrates_and_says_so(
    sparse: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain ``--model_args pretrained=X``; results name the criterion and the completion that ran."""
    lm = sparse(profile=None, profile_cache=str(tmp_path))
    assert "no profile was given: calibrating before the tasks (profile=auto)." in caplog.messages
    assert lm.calibration.record["cached"] is False
    told = lm.get_model_info()["fasa"]
    assert told["profile"] == lm.profile.fingerprint
    assert (told["criterion"], told["packed_dtype"], told["completion"]) == ("variance", "int4", "first_order")
    assert sparse(profile="auto", profile_cache=str(tmp_path)).calibration.record["cached"] is True


def test_adjacent_pairs_have_a_profile_of_their_own(
    sparse: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever profile is passed; one of its own kind is taken as it is."""
    cache = str(tmp_path)
    made = sparse(method="adjacent_pairs", profile_cache=cache)
    assert made.profile.layout.chunks[0].tolist() == [0, 1]
    assert made.calibration.record["cached"] is False
    assert made.get_model_info()["fasa"]["profile"] == made.profile.fingerprint
    planes = sparse(profile="auto", profile_cache=cache)
    assert planes.profile.layout.chunks[0].tolist() == [0, 8]
    assert planes.calibration.record["cached"] is False
    monkeypatch.setattr(profiles, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    for given in (None, "auto", planes.profile, made.profile):
        again = sparse(method="adjacent_pairs", profile=given, profile_cache=cache)
        assert again.profile.fingerprint == made.profile.fingerprint
    assert again.calibration.record is None  # given


def test_channels_are_calibrated_on_the_same_texts(sparse: Load, tmp_path: Path) -> None:
    lm = sparse(method="double_sparsity", profile=None)
    assert lm.profile is None
    assert lm.calibration.channels.shape == (3, 2, 16)
    theirs = sparse(profile="auto", profile_cache=str(tmp_path)).calibration.record
    assert lm.calibration.record["sha256"] == theirs["sha256"]
    text = tmp_path / "source.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    other = sparse(method="double_sparsity", calibration_source=str(text))
    named = {lm.get_model_info()["fasa"]["profile"] for lm in (lm, other)}
    assert len(named) == 2
    assert None not in named


@pytest.mark.parametrize("source", ["qasper", "missing.txt"])
def test_an_unknown_source_is_one_sentence(sparse: Load, tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=f"calibration_source='{source}' is neither 'facts' nor a text file"):
        sparse(profile="auto", profile_cache=str(tmp_path), calibration_source=source)


def test_a_short_source_is_refused(sparse: Load, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("def f(x)")
    with raises_sentence(ValueError, match="calibration needs at least 64; pass a longer text"):
        sparse(profile="auto", profile_cache=str(tmp_path), calibration_source=str(short))


def test_profiles_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.default_cache() == tmp_path / "fasa_flex" / "profiles"


def test_prompts_that_draw_from_the_global_generator_stay_the_same(sparse: Load, tmp_path: Path) -> None:
    """RULER's frequent words, built as lm-eval builds them: behind the model's constructor, which follows the seeds."""
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    def prompts(load: Callable[[], object]) -> list[str]:
        random.seed(0)
        np.random.seed(1234)
        load()
        return [doc["input"] for doc in sys_kwext(plain, max_seq_length=600, num_samples=3)]

    plain = sparse().tokenizer
    without = prompts(lambda: None)
    assert len(set(without)) == 3
    assert prompts(lambda: sparse(profile="auto", profile_cache=str(tmp_path))) == without
    assert prompts(lambda: sparse(profile="auto", profile_cache=str(tmp_path))) == without  # found, not calibrated


def test_with_profile_prompt_the_model_calibrates_itself(sparse: Load) -> None:
    lm = sparse(profile="prompt")
    assert lm.fasa.profile is None
    request = Instance("loglikelihood", {}, (heldout_text()[:900], " return x"), 0, metadata=("t", 0, 1))
    lm.loglikelihood([request], disable_tqdm=True)
    assert lm.fasa.profile is not None
    account = lm.get_model_info()["fasa"]
    assert account["calibration"] == {"name": "prompt"}
    assert account["tasks"]["t"]["sparse_queries"] > 0


def test_with_profile_prompt_a_prompt_in_parts_is_calibrated_on_as_a_whole(sparse: Load) -> None:
    """Continuations of one context share its prefill, which goes through the cache in parts."""
    context = heldout_text()[:900]
    requests = [
        Instance("loglikelihood", {}, (context, end), number, metadata=("t", number, 1))
        for number, end in enumerate((" return x", " return y"))
    ]
    lm = sparse(profile="prompt")
    lm.passes.limits = replace(lm.passes.limits, part=150)
    lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.passes.shared_prefills == 1
    assert lm.fasa.profile is not None
    length = len(lm.tok_encode(context))
    found = lm.fasa.profile.provenance.sample_hashes[0]
    assert found in {f"the last queries of a prompt of {length - short} tokens" for short in (0, 1)}
    assert lm.get_model_info()["fasa"]["profile"] == lm.fasa.profile.fingerprint


def test_a_profile_that_is_not_there_is_named(sparse: Load, tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nowhere"), "nowhere/at-all"):
        with raises_sentence(ValueError, match=f"^{missing} is no folder, and the Hub gives no such profile"):
            sparse(profile=missing)
    with pytest.raises(ValueError, match="serves method=fasa alone, got method=oracle"):
        sparse(profile="prompt", method="oracle")
