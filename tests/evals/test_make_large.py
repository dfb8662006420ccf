"""The large reference model and its study, in small: from a text to what is kept, and from that to figures."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.quality import documents, large
from evals.reference_model import eight_bits, make_large, score
from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.lm_eval.haystack import heldout_text

EVALS = Path(__file__).parents[2] / "evals"
REFERENCE, SHIPPED = EVALS / "reference_model", EVALS / "reference_model_large"
TEXT = heldout_text()[:120_000]


def test_what_is_kept_is_the_model_that_was_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(score, "heldout_text", lambda: TEXT[:20_000])
    words = ["--recipe", "quick", "--text", tmp_path / "text.txt", "--work", tmp_path / "work", "--questions", 2]
    monkeypatch.setattr(sys, "argv", ["make_large", *map(str, words), "--out", str(tmp_path / "out")])
    make_large.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["beside.tar", "eight_bits-1-of-1.safetensors"]

    with tarfile.open(tmp_path / "out" / "beside.tar") as bundle:
        bundle.extractall(tmp_path / "out", filter="data")
    eight_bits.unpack(tmp_path / "out", tmp_path / "again")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert str(tmp_path) not in scores["command"]
    assert {row["length"] for row in scores["retrieval"]} == {512, 1024}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert scores["parameters"] == model.num_parameters()
    assert score.perplexity(model, tokenizer) == scores["perplexity"]
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()] == [50]


def test_the_shipped_model_answers_densely_and_by_sixty_four_keys(tmp_path: Path) -> None:
    assert all(path.stat().st_size < 16 * 2**20 for path in SHIPPED.iterdir())
    eight_bits.unpack(SHIPPED, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.num_parameters() == json.loads((SHIPPED / "scores.json").read_text())["parameters"] > 48e6
    docs = score.documents(tokenizer, 1024, 2, 8)
    assert score.answered(model, tokenizer, docs) == [True, True]
    profile = calibrate(model, [docs[0].prompt], max_new_tokens=4, progress=False, tokenizer=tokenizer)
    ids = torch.tensor([tokenizer.encode(docs[1].prompt)])
    with enable(model, profile, FasaConfig(n_tip=8, n_fac=64, dense_layers=())) as fasa:
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0, ids.shape[1] :]) == docs[1].answer
    assert fasa.stats.sparse_queries == 3 * 14


def test_the_shipped_scores_are_those_of_its_page() -> None:
    page, scores = (SHIPPED / "README.md").read_text(), json.loads((SHIPPED / "scores.json").read_text())
    for n_facts in (8, 16):
        exact = (f"{row['exact']:.3f}" for row in scores["retrieval"] if row["n_facts"] == n_facts)
        assert f"| {n_facts} facts, exact answers | {' | '.join(exact)} |" in page
    perplexities = " | ".join(f"{row['perplexity']:.2f}" for row in scores["perplexity"])
    assert f"| perplexity of its last 128 tokens | {perplexities} |" in page


@pytest.mark.slow
def test_the_study_runs_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["large", "--quick", "--model", str(REFERENCE), "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    threads = torch.get_num_threads()
    large.main()
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "large.json").read_text())
    assert str(tmp_path) not in found["command"]
    rows = [row for part in ("needles", "text") for row in found["parts"][part]["rows"]]
    arms = {(row["task"], row["method"], row["budget"]): row for row in rows}
    assert len(arms) == 3 * (1 + len(large.ARMS) * len(large.BUDGETS))
    dense = arms["text", "dense", None]["mean"]
    for method in large.ARMS:
        above = [arms["text", method, budget]["above_dense"][0] for budget in large.BUDGETS]
        assert above[-1] == pytest.approx(arms["text", method, 1024]["mean"] - dense, abs=2e-4)
        assert abs(above[-1]) < 0.02
    worst = [arms["text", method, 16]["mean"] for method in ("oracle", "FASA", "random chunks")]
    assert worst == sorted(worst)
    assert arms["needles", "dense", None]["mean"] == 1.0
    assert {row["method"] for row in found["parts"]["compound"]["rows"]} > {"dominant", "random chunks", "SnapKV"}


def test_sparse_queries_behind_a_cache_are_those_of_one_forward() -> None:
    study = documents.Study(documents.QUICK, REFERENCE, text=TEXT)
    trial = large.Trial(study, 1)
    sparse: dict[str, Any] = {}
    with torch.no_grad(), trial.arm("FASA", 16) as fasa:
        (tail,) = trial.questions
        start = tail.cache.get_seq_length()
        with fasa.sparse_from(torch.tensor([start])):
            sparse["behind"] = trial.logits(tail)
        found = large.haystack("large/0", documents.QUICK.length, study.tokenizer)
        ids = torch.tensor(study.tokenizer(found.prompt + found.answer).input_ids[:-1])
        fasa.stats.reset()
        with fasa.sparse_from(torch.tensor([start])):
            sparse["whole"] = study.model(ids[None], use_cache=False).logits[0, -len(tail.expected) :]
        assert fasa.stats.sparse_queries == len(tail.ids) * study.model.config.num_hidden_layers
    torch.testing.assert_close(sparse["behind"], sparse["whole"], atol=1e-4, rtol=1e-4)
