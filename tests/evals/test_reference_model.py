"""The shipped reference model and the sequences it was trained on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.reference_model import train
from evals.reference_model.data import ANSWER, NOISE, TEXT, Sampler, Vocabulary
from evals.reference_model.recipe import LARGE, QUICK, RECIPE, Recipe, Stage
from evals.reference_model.score import answered, documents
from fasa_flex.lm_eval.haystack import SYLLABLES, document, draw_facts, heldout_text

FOLDER = Path(__file__).parents[2] / "evals" / "reference_model"
KINDS = ("copy", "echo", "bare", "facts", "final")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    vocabulary = Vocabulary.of(tokenizer.encode, len(tokenizer))
    return Sampler(np.array(tokenizer.encode(heldout_text()[:100_000])), vocabulary, tokenizer.bos_token_id)


def test_tokenizer_gives_text_back_and_adds_nothing(tokenizer):
    text = heldout_text()[:20_000] + "\tétat\r\n\n  €  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(tokenizer.encode(syllable)) == 1 for syllable in SYLLABLES)
    assert tokenizer.padding_side == "left"


def test_tokens_meet_where_question_meets_answer(tokenizer):
    encode = tokenizer.encode
    doc = document(Random(0), length=512, count_tokens=lambda text: len(encode(text)), n_facts=8)
    for index, fact in enumerate(doc.facts):
        assert encode(doc.ask(index)) + encode(fact.answer) == encode(doc.ask(index) + fact.answer)
        assert encode(doc.text) + encode(fact.question) == encode(doc.ask(index))
        assert len(encode(fact.answer)) == 4


def test_model_loads_and_answers_by_content(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 16e6
    assert model.config.max_position_embeddings > 4096
    docs = [
        document(Random(i), length=1024, count_tokens=lambda text: len(tokenizer.encode(text)), n_facts=8)
        for i in range(8)
    ]
    assert sum(answered(model, tokenizer, docs)) >= 7
    doc = docs[0]
    ids = torch.tensor([tokenizer.encode(doc.prompt)])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0, ids.shape[1] :]) == doc.answer


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_function_of_the_generator(sampler, kind):
    ids, roles = sampler.batch(np.random.default_rng(5), kind, 4, 256)
    again, _ = sampler.batch(np.random.default_rng(5), kind, 4, 256)
    assert ids.shape == roles.shape == (4, 256)
    assert (ids == again).all()
    assert (roles == ANSWER).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_token_stands_earlier_after_the_same_token(sampler, kind):
    for seed in range(8):
        row, role = (array.tolist() for array in getattr(sampler, kind)(np.random.default_rng(seed), 512))
        pairs = [*pairwise(row)]
        assert all(pairs[i - 1] in pairs[: i - 1] for i in range(1, 512) if role[i] == ANSWER)


def test_sequences_with_facts_are_text_with_whole_lines_put_in(sampler, tokenizer):
    ids, roles = sampler.batch(np.random.default_rng(2), "facts", 1, 512)
    lines = tokenizer.decode(ids[0]).split("\n")
    facts = [line for line in lines if lines.count(line) == 2 and line.endswith('"') and line[:2] in SYLLABLES]
    assert facts
    assert (roles[0] == NOISE).any()
    text = "\n".join(line for line in lines if line not in facts)
    assert text.removeprefix(tokenizer.bos_token) in heldout_text()[:100_000]


def test_facts_are_tokens_of_the_fact_language(sampler, tokenizer):
    facts = draw_facts(Random(3), 16)
    used = {i for fact in facts for i in tokenizer.encode(fact.key + fact.value)}
    assert used <= set(sampler.vocabulary.syllables.tolist())


def test_text_that_is_silenced_has_no_loss_and_answers_keep_theirs(sampler):
    _, roles = sampler.batch(np.random.default_rng(0), "facts", 64, 256)
    silenced = sampler.silence(np.random.default_rng(0), roles, 0.25)
    assert ((silenced == roles) | ((roles == TEXT) & (silenced == NOISE))).all()
    heard = (silenced == TEXT).any(1)
    assert (silenced[heard] == roles[heard]).all()
    assert 4 <= heard.sum() <= 32
    assert (sampler.silence(np.random.default_rng(0), roles, 1.0) == roles).all()


def test_workers_draw_the_same_batches(sampler):
    stage = Stage("mixed", 1, (("facts", 256, 0.5), ("copy", 64, 0.5)), (1.0, 1.0))
    alone, ahead = (
        [*itertools.islice(train.Batches(replace(QUICK, workers=workers), sampler, stage).since(3), 6)]
        for workers in (0, 2)
    )
    assert {ids.shape[1] for ids, _ in alone} == {64, 256}
    for (ids, roles), (same, too) in zip(alone, ahead, strict=True):
        assert torch.equal(ids, same)
        assert torch.equal(roles, too)


def test_a_run_with_little_time_gives_up_tokens_and_ends_with_its_learning_rate(sampler, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))  # a second a step, and one a report
    monkeypatch.setattr(train, "REPORT", 1)
    stages = (
        Stage("skill", 7 * 64, (("copy", 32, 1.0),), (1e-2, 1e-2), until=2.0),
        Stage("short", 100 * 64, (("copy", 32, 1.0),), (1e-2, 1e-2)),
        Stage("long", 300 * 64, (("copy", 32, 1.0),), (1e-2, 0.0)),
    )
    recipe = Recipe(stages, vocab=sampler.vocabulary.size, width=16, ffn=16, layers=1, batch_tokens=64, warmup=1)
    run = train.Run(recipe, sampler, tmp_path, torch.device("cpu"), minutes=100 / 60)
    run.train()
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    steps = {name: sum(row["stage"] == name for row in rows) for name in ("skill", "short", "long")}
    assert steps["skill"] == 7
    assert steps["long"] == pytest.approx(3 * steps["short"], abs=4)
    assert 90 <= run.seconds <= 104
    assert rows[-1]["lr"] < 5e-4
    rates = [row["lr"] for row in rows if row["stage"] == "long"]
    assert rates == sorted(rates, reverse=True)


def test_recipes_grow_to_the_length_that_they_are_for():
    for recipe, length in ((RECIPE, 4096), (LARGE, 8192)):
        assert max(length for stage in recipe.stages for _, length, _ in stage.mix) == length < recipe.max_length
        assert recipe.stages[-1].lr[1] == 0.0
        assert all(before.lr[1] == after.lr[0] for before, after in pairwise(recipe.stages))
    with torch.device("meta"):
        assert 48e6 < train.build_model(LARGE).num_parameters() < 49e6


def test_tokens_counted_line_by_line_give_the_same_documents(tokenizer):
    def count(text):
        return len(tokenizer.encode(text))

    whole = [document(Random(i), length=900, count_tokens=count, n_facts=8) for i in range(6)]
    assert documents(tokenizer, 900, 6, 8) == whole


def test_an_interrupted_run_ends_with_the_same_weights(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "REPORT", 2)
    stages = (
        Stage("copy", 4 * 64, (("copy", 32, 1.0),), (1e-2, 1e-2)),
        Stage("text", 6 * 64, (("facts", 64, 0.5), ("echo", 32, 0.5)), (1e-2, 0.0)),
    )
    recipe = Recipe(stages, vocab=sampler.vocabulary.size, width=16, ffn=16, layers=1, batch_tokens=64, warmup=2)
    device = torch.device("cpu")
    train.Run(recipe, sampler, tmp_path / "whole", device).train()

    broken = train.Run(recipe, sampler, tmp_path / "broken", device)
    broken.saved = -1e9
    monkeypatch.setattr(broken, "_report", _fail_at(broken, 8))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    train.Run(recipe, sampler, tmp_path / "broken", device).train()

    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert whole["progress"]["step"] == resumed["progress"]["step"] == 10
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10]

    with pytest.raises(ValueError, match="another recipe"):
        train.Run(replace(recipe, seed=1), sampler, tmp_path / "whole", device)


def _fail_at(run, step):
    report = run._report

    def report_or_fail(stage, recent):
        if run.step == step:
            raise KeyboardInterrupt
        return report(stage, recent)

    return report_or_fail
