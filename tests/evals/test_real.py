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

from evals.quality import real, real_documents, real_results
from evals.quality.real_arms import DEFAULTS, SETS, Arm, Lengths, arms_of
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
        monkeypatch.setattr(real_documents, "FIRST_TOKEN", 1_000)
        monkeypatch.setattr(sys, "argv", ["real.py", *words, *(word for arm in arms for word in ("--arm", arm))])
        real.run(real.parser().parse_args())
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
    tail, enabled = real.Evaluation._tail, real.Evaluation._enabled
    under = []

    def watched(self: Any, document: real_documents.Document, *args: Any) -> Any:
        asked.append((document.kind, document.name, under[-1]))
        return tail(self, document, *args)

    def entered(self: Any, arm: Arm) -> Any:
        under.append(next(name for name, other in self.arms.items() if other == arm))
        return enabled(self, arm)

    monkeypatch.setattr(real.Evaluation, "_tail", watched)
    monkeypatch.setattr(real.Evaluation, "_enabled", entered)
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
    dense, fasa = real_results.summary(results)
    assert "ppl @300 x1.0000" in dense
    assert "256: 1/1  512: 1/1" in dense
    assert "ppl @300 x1.1052 [1.1052, 1.1052] (2)" in fasa
    assert "512: 0/1" in fasa


@pytest.mark.slow
def test_arms_of_all_kinds_run_and_methods_that_evict_see_the_prefix(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that evicts and keeps everything is dense, and one that was shown the tail alone would not run."""
    seen = []
    whole = real.Evaluation._whole
    monkeypatch.setattr(
        real.Evaluation, "_whole", lambda *given: seen.extend(document.name for document in given[1]) or whole(*given)
    )
    names = ["snapkv 0.99 n_sink=0 n_recent=0", "h2o 64 published", "quest 64 published"]
    names += ["double_sparsity 64 published", "sparq 64 published", "sparq 64 n_tip=0.5 published"]
    names += ["vattention 64 n_recent=4", "vattention 64 n_recent=4 sample=0.25", "vattention_oracle 64 n_recent=4"]
    names += ["fasa 64 only=1", "random_chunks 64 completion=first_order", "paper 64"]
    made = run(*names, text="topics", calibrate="topics", prompts=0)
    window = made["windows"]["300/0"]
    assert window.keys() == {"dense", *names}
    assert seen == ["300/0"] * 2
    assert window["snapkv 0.99 n_sink=0 n_recent=0"] == pytest.approx(window["dense"], abs=0.05)
    assert len({round(loss, 6) for loss in window.values()}) == len(window)
    assert made["reported_on"] == ["topics, report"]
    assert made["calibrated_on"] == ["topics, calibration"]
    reads = {name.split(" @")[0]: share for name, share in made["bytes_read_share"].items()}
    valid = 300 - 16 / 2 + 0.5  # keys of the mean query of the tail
    dim, packed = 8, (4 * 4 / 8 + 2) / (2 * 8 * 2)  # of a 16-bit cache: half of the chunks in four bits and a scale
    assert reads["vattention 64 n_recent=4"] == pytest.approx(packed + 64 / valid, abs=1e-3)
    assert reads["sparq 64 published"] == pytest.approx(2 / (2 * dim) + (64 + 0.5) / valid, abs=1e-3)


@pytest.mark.slow
def test_processes_share_the_documents_of_a_run(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each writes its own file from what is held already; joined they are as of one process."""
    alone = run("fasa 64", "h2o 64", windows=3, prompts=0)
    (tmp_path / "results.json").rename(tmp_path / "alone.json")
    ran = []

    def inside(words: list[str]) -> Any:
        ran.append(words[-1])
        monkeypatch.setattr(sys, "argv", ["real.py", *words[3:]])
        real.run(real.parser().parse_args())
        return type("Done", (), {"wait": lambda self: 0, "args": words})()

    monkeypatch.setattr(real.subprocess, "Popen", inside)
    shared = run("fasa 64", "h2o 64", windows=3, prompts=0, processes=2)
    assert ran == ["--shard=0/2", "--shard=1/2"]
    assert shared["windows"] == alone["windows"]
    assert shared["bytes_read_share"] == alone["bytes_read_share"]
    assert sorted(path.name for path in tmp_path.glob("results*")) == ["results.json"]


def test_sets_of_arms_reach_as_far_as_they_say() -> None:
    lengths = Lengths((1024, 8192), (1024, 2048, 4096, 7680))
    for name, made in SETS.items():
        arms = arms_of(made(range(4)), layers=range(4))
        assert len({json.dumps(arm.record()) for arm in arms.values()}) == len(arms), name
    study = arms_of(SETS["study"](range(4)))
    assert all(study[name].reaches("needles", 1024, 99, lengths) for name in DEFAULTS)
    evicting = arms_of(SETS["evicting"](range(4)))["h2o 256 published"]
    assert evicting.reaches("windows", 8192, 29, lengths)
    assert not evicting.reaches("windows", 8192, 30, lengths)
    assert not evicting.reaches("windows", 1024, 0, lengths)
    assert not study["fasa 1024"].reaches("needles", 1024, 0, Lengths((), (1024,)))
    assert arms_of(SETS["layers"](range(4)), layers=range(4))["fasa 64 only=2"].config.dense_layers == (0, 1, 3)
    published = study["sparq 128 published"].config
    assert (published.completion, published.n_recent, published.group_reduce) == ("mean", 32, "softmax_exact")


def test_work_is_divided_evenly_and_whole() -> None:
    lengths = Lengths((8192,), (1024, 2048, 7680))
    arms = arms_of({**SETS["study"](range(4)), **SETS["evicting"](range(4))})
    jobs = [("windows", 8192, i, 30) for i in range(30)] + [("needles", 2048, i, 100) for i in range(100)]
    parts = [real.divided(jobs, arms, lengths, number, 8) for number in range(8)]
    assert all(own == arms for _, own in parts)
    documents = [part for part, _ in parts]
    assert sorted(job for part in documents for job in part) == sorted(jobs)
    assert all(part == [job for job in jobs if job in part] for part in documents)
    windows = [sum(job[0] == "windows" for job in part) for part in documents]
    assert max(windows) - min(windows) <= 1
    evicting = arms_of(SETS["evicting"](range(4)))
    each = [real.divided(jobs, evicting, lengths, number, 4) for number in range(4)]
    assert all(part == jobs and "dense" in own for part, own in each)
    assert sorted(name for _, own in each for name in own if name != "dense") == sorted(evicting.keys() - {"dense"})


def test_windows_of_a_short_text_move_together_until_their_tails_meet() -> None:
    starts = real_documents.window_starts
    assert starts(200_000, 8192, 3, 512) == [12_000, 21_000, 30_000]
    assert starts(200_000, 16_384, 3, 512) == [12_000, 28_384, 44_768]
    assert starts(20_000, 8192, 3, 512) == [0, 5_904, 11_808]
    close = starts(9_000, 8192, 30, 512)
    assert close == [0, 808]
    assert starts(8_000, 8192, 3, 512) == []


def test_intervals_are_those_of_students_t() -> None:
    mean, low, high, count = real_results.interval([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    assert (mean, count) == (4.0, 6)
    half = 2.5706 * 2.8284 / 6**0.5
    assert (low, high) == (pytest.approx(4 - half, abs=0.03), pytest.approx(4 + half, abs=0.03))


def test_an_arm_of_other_options_is_not_taken_for_the_same(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    arms = arms_of(["vattention 64"])
    assert arms["dense"].config is None
    path.write_text(json.dumps(real_results.opened(path, {}, arms)))
    assert real_results.opened(path, {}, arms)["arms"].keys() == {"dense", "vattention 64"}
    with pytest.raises(SystemExit, match="other options or defaults"):
        real_results.opened(path, {}, {"vattention 64": arms["vattention 64"]._replace(sample=0.25)})


@pytest.mark.slow
def test_documents_measured_together_have_their_own_scores(run: Run, tmp_path: Path) -> None:
    """A method that evicts runs documents of equal shape in one forward, and none sees another."""
    arms = ("snapkv 64 published", "h2o 64 published", "rkv 64 published")
    together = run(*arms, windows=2, prompts=0, together=2)
    (tmp_path / "results.json").unlink()
    alone = run(*arms, windows=2, prompts=0, together=1)
    assert together["windows"].keys() == {"300/0", "300/1"}
    for name, scores in together["windows"].items():
        assert scores == pytest.approx(alone["windows"][name], abs=1e-5)


@pytest.mark.slow
def test_arms_that_prefill_by_blocks(run: Run) -> None:
    """At a share of one they are level with dense attention, whatever the estimator; below, blocks are counted."""
    options = ("1.0 blocks=1.0", "1.0 blocks=0.6", "16 blocks=0.6", "1.0 blocks=0.6 estimator=window")
    names = [f"fasa {each} dense_layers=[]" for each in options]
    made = run(*names, length=1000, lengths="900")
    window = made["windows"]["1000/0"]
    assert window[names[0]] == pytest.approx(window["dense"], abs=1e-5)
    assert len({round(window[name], 4) for name in names}) == 4
    assert made["block_share"][f"{names[0]} @ 1000"] == 1.0  # no query of a prefill by blocks
    assert 0 < made["block_share"][f"{names[1]} @ 1000"] < 1
    assert made["arms"][names[3]]["estimator"] == "window"


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="names no estimator; write estimator=pooled"):
        arms_of(["fasa 128 blocks=0.2 estimator=best"])
