"""The packaged tasks' documents: long enough, answerable, private, and the same whatever the limit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fasa_flex.lm_eval import TASKS_PATH, documents
from fasa_flex.lm_eval.haystack import heldout_text


@pytest.fixture
def given(checkpoint: Path) -> dict[str, object]:
    return {"pretrained": str(checkpoint), "num_docs": 6, "max_seq_lengths": [256, 512], "n_facts": 4}


def test_prompts_fill_their_length_and_leave_room_for_the_answer(checkpoint: Path, given: dict[str, object]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for task in (documents.needle, documents.recall):
        for doc in task(**given)["test"]:
            tokens = len(tokenizer(doc["prompt"]).input_ids)
            answer = len(tokenizer(doc.get("answer") or doc["value"] + '"').input_ids)
            assert 0.9 * doc["length"] < tokens + answer <= doc["length"]
            assert answer <= documents.ANSWER_TOKENS


def test_the_answer_stands_once_in_the_text_behind_its_key(given: dict[str, object]) -> None:
    for doc in documents.needle(**given)["test"]:
        text, question = doc["prompt"].rsplit("\n", 1)
        assert text.count(f'{question}{doc["value"]}"') == 1
        assert doc["value"] not in text.replace(f'{question}{doc["value"]}"', "")
        assert doc["depth"] == text.index(f'{question}{doc["value"]}"') / len(text)


def test_recall_asks_several_questions_of_one_text(given: dict[str, object]) -> None:
    docs = [doc for doc in documents.recall(**given)["test"] if doc["length"] == 512]
    texts = [doc["prompt"].rsplit("\n", 1)[0] for doc in docs]
    assert len(set(texts)) == 2  # six questions, four to a text
    assert len({doc["answer"] for doc in docs}) == 6


def test_lengths_alternate_and_a_smaller_run_is_a_beginning(given: dict[str, object]) -> None:
    for task in (documents.needle, documents.recall, documents.ppl):
        docs = list(task(**given)["test"])
        assert [doc["length"] for doc in docs[:4]] == [256, 512, 256, 512]
        fewer = list(task(**{**given, "num_docs": 3})["test"])
        assert fewer == docs[: len(fewer)]


def test_perplexity_pieces_are_the_heldout_text(checkpoint: Path, given: dict[str, object]) -> None:
    docs = list(documents.ppl(**{**given, "max_seq_lengths": [256], "num_docs": 5})["test"])
    text = "".join(doc["text"] for doc in docs)
    assert heldout_text().startswith(text)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert all(200 < len(tokenizer(doc["text"]).input_ids) <= 256 for doc in docs)


def test_global_random_state_plays_no_part(given: dict[str, object]) -> None:
    random.seed(1)
    before = random.getstate()
    first = documents.needle(**given)["test"][0]
    assert random.getstate() == before
    documents._needle.cache_clear()
    random.seed(2)
    assert documents.needle(**given)["test"][0] == first


def test_results_name_their_length_only_where_there_are_several() -> None:
    doc = {"value": "LOMUTE", "length": 512, "several_lengths": False}
    assert documents.needle_results(doc, [" LOMUTE\n"]) == {"exact_match": 1.0}
    assert documents.needle_results(doc | {"several_lengths": True}, ["LOMUTU"]) == {
        "exact_match": 0.0,
        "exact_match_512": 0.0,
    }
    assert documents.recall_results(doc, [(-1.5, True)]) == {"acc": 1.0, "nll": 1.5}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_seq_lengths": [0]}, "max_seq_lengths must be whole numbers of tokens above 64"),
        ({"max_seq_lengths": "2k"}, "max_seq_lengths must be whole numbers"),
        ({"pretrained": None}, "no tokenizer was named; pass"),
        ({"num_docs": 0}, "num_docs must be a whole number above 0, got 0"),
        ({"n_facts": "8"}, "n_facts must be a whole number above 0, got '8'"),
    ],
)
def test_bad_metadata_is_one_sentence(given: dict[str, object], change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        documents.needle(**{**given, **change})


def test_tasks_are_packaged() -> None:
    assert {path.stem for path in TASKS_PATH.glob("*.yaml")} == {
        *("fasa_needle", "fasa_needle_single", "fasa_needle_multikey", "fasa_needle_multivalue"),
        *("fasa_needle_multiquery", "fasa_recall", "fasa_recall_long", "fasa_variables", "fasa_copy", "fasa_count"),
        *("fasa_ppl", "fasa_ppl_position"),
    }
