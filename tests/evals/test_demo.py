"""The demo, on a tiny random model: documents, arms, table, and that it refuses to print a table that would mislead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.quality import arms, demo, demo_tables, topics

FASA = arms.Arm("FASA", "fasa_hf", 64)
TASKS = {"fasa_needle": "generate_until", "fasa_recall": "loglikelihood", "fasa_ppl": "loglikelihood_rolling"}
Chatting = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def results(sparse_queries: int) -> dict[str, Any]:
    account = {"dense_queries": 5, "sparse_queries": sparse_queries, "kv_share": 0.03, "kv_bytes_share": 0.155}
    return {
        "results": {
            task: {f"{arms.METRICS[task]},none": 0.5, f"{arms.METRICS[task]}_stderr,none": "N/A"} for task in TASKS
        },
        "config": {"fasa": {"requests": dict.fromkeys(TASKS.values(), account)}},
        "configs": {task: {"output_type": kind} for task, kind in TASKS.items()},
        "n-samples": {task: {"effective": 7} for task in TASKS},
        "samples": {task: [{"doc_id": 1, "prompt_hash": "b"}, {"doc_id": 0, "prompt_hash": "a"}] for task in TASKS},
    }


def test_rows_carry_the_account() -> None:
    rows = list(arms.rows_of(FASA, results(sparse_queries=9)))
    assert [row["task"] for row in rows] == list(TASKS)
    assert rows[0] | {"task": None} == {
        "task": None,
        "metric": "exact_match",
        "method": "FASA",
        "budget": 64,
        "score": 0.5,
        "stderr": None,
        "documents": 7,
        "attended": 0.03,
        "read": 0.155,
        "sparse_queries": 9,
    }
    assert "| fasa_needle (exact_match) | FASA | 64 | 0.500 | 3.0% | 15.5% | 9 |" in arms.table(rows)


def test_a_sparse_arm_without_sparse_queries_stops_a_comparison() -> None:
    with pytest.raises(SystemExit, match="FASA, 64 tokens had no sparse query in fasa_needle"):
        list(arms.rows_of(FASA, results(sparse_queries=0)))


def test_prompts_are_compared_in_document_order() -> None:
    one, other = results(1), results(1)
    other["samples"]["fasa_ppl"].reverse()
    assert arms.prompt_hashes(one) == arms.prompt_hashes(other)
    other["samples"]["fasa_ppl"][0]["prompt_hash"] = "c"
    assert arms.prompt_hashes(one)["fasa_ppl"] != arms.prompt_hashes(other)["fasa_ppl"]


def test_calibration_and_report_share_no_passage() -> None:
    learnt, read = (
        {line.strip() for name in names for line in topics.text_of(name).splitlines() if len(line.strip()) > 50}
        for names in (topics.CALIBRATED, topics.REPORTED)
    )
    assert min(len(learnt), len(read)) > 500
    assert not learnt & read


def test_documents_are_cut_without_loss(chatting: Chatting) -> None:
    _, tokenizer = chatting
    texts = topics.windows(tokenizer, topics.REPORTED, 400)
    assert [text for text in texts if topics.text_of("types").startswith(text)] == [texts[2]]
    for text, row in zip(texts[:3], topics.continuations(tokenizer, texts[:3], 50), strict=True):
        assert row["prompt"] + row["target"] == text
        assert not row["prompt"][-1].isspace()
        assert 50 <= row["tokens"] < 80
    rows = topics.needles(tokenizer, texts[:2])
    assert [row["text"] for row in rows] == [0] * topics.QUESTIONS + [1] * topics.QUESTIONS
    for row in rows:
        assert row["prompt"].count(f"{row['opening'].removeprefix('The')} {row['answer'].strip()}.") == 1
        assert row["prompt"].endswith("mentioned in the provided text?")
    assert len({len(tokenizer(row["prompt"]).input_ids) for row in rows[: topics.QUESTIONS]}) == 1


def test_an_unknown_topic_is_named() -> None:
    with pytest.raises(ValueError, match="no topic 'asphalt'"):
        topics.text_of("asphalt")


@pytest.mark.slow
def test_every_arm_is_evaluated_on_the_same_documents(
    chatting: Chatting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = chatting
    monkeypatch.setattr(demo, "QUESTION_TOKENS", 32)
    record = demo.run(model, tokenizer, tmp_path, texts=2, length=700, scored=40)
    assert record == json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "profile" / "config.json").exists()
    needles, text = ([row for row in record["rows"] if row["task"] == task] for task in (demo.NEEDLES, demo.TEXT))
    assert [row["method"] for row in needles] == [arm.method for arm in demo.arms(2)]
    assert {row["documents"] for row in needles} == {2 * topics.QUESTIONS}
    dense, *sparse = text
    assert dense["score"] == pytest.approx(sum(dense["texts"]) / 2)
    assert (dense["sparse_queries"], dense["attended"], dense["read"]) == (0, 1, 1)
    assert all(row["texts"] != dense["texts"] and 0 < row["attended"] < 1 for row in sparse)
    assert record["table"].count("\n") == len(text) + 1
    lines = {line["name"]: line for line in demo_tables.summary(record["rows"])}
    own = sparse[-1]["score"] - dense["score"]
    assert lines["sinks + recent, 256 tokens"]["over_dense"][0] == pytest.approx(math.exp(own))
    assert model.config._attn_implementation == "sdpa"  # dense again


def test_needles_are_asked_by_chat_template_up_to_the_number(chatting: Chatting) -> None:
    model, tokenizer = chatting
    hf = HFLM(model, tokenizer=tokenizer, backend="causal")
    task = demo.tasks(tokenizer, 1, 200, 20)[demo.NEEDLES]
    (sample,) = demo.evaluate(hf, demo.NEEDLES, task, documents=1)["samples"][demo.NEEDLES]
    context, answer = sample["arguments"][0]
    assert context.startswith("<eos>user\nSome special magic numbers")
    assert context.endswith(f"<eos>assistant\n{sample['doc']['opening']}")
    assert f"{sample['doc']['opening'].removeprefix('The')}{answer}." in context


def test_a_dense_arm_that_is_not_hf_stops_the_demo(chatting: Chatting) -> None:
    model, tokenizer = chatting
    hf = HFLM(model, tokenizer=tokenizer, backend="causal")
    tasks = {demo.TEXT: demo.tasks(tokenizer, 1, 200, 20)[demo.TEXT]}
    with pytest.raises(SystemExit, match="topics_text: hf gives the first answer"):
        demo.check_dense(hf, tasks, {demo.TEXT: 0.0})
