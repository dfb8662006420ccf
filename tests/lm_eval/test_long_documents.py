"""The documents with several facts or long answers: well-posed, of their length, and scored as they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fasa_flex.lm_eval import long_documents as tasks

Task = Callable[..., dict[str, Any]]
GENERATED = (tasks.multivalue, tasks.multiquery, tasks.variables, tasks.copy, tasks.count_facts)
EVERY = (*GENERATED, tasks.long_recall, tasks.ppl_position)


@pytest.fixture
def given(checkpoint: Path) -> dict[str, object]:
    return {"pretrained": str(checkpoint), "num_docs": 3, "max_seq_lengths": [768, 1024]}


def docs(task: Task, given: dict[str, object]) -> list[dict[str, Any]]:
    return list(task(**given)["test"])


@pytest.mark.parametrize("task", EVERY)
def test_prompts_leave_room_for_their_answers(task: Task, given: dict[str, object], checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = docs(task, given)
    assert len(found) == 6
    for doc in found:
        answer = (
            doc.get("answer") or doc.get("passage") or doc.get("target") or " ".join(doc.get("words") or doc["lines"])
        )
        tokens = len(tokenizer(doc["prompt"]).input_ids) + len(tokenizer(answer).input_ids)
        assert 0.75 * doc["length"] < tokens <= doc["length"]


@pytest.mark.parametrize("task", EVERY)
def test_documents_are_a_function_of_their_number(task: Task, given: dict[str, object]) -> None:
    found = docs(task, given)
    assert docs(task, {**given, "num_docs": 2}) == found[:4]
    assert len({doc["prompt"] for doc in found}) == len(found)


def test_all_values_of_the_name_are_asked_for(given: dict[str, object]) -> None:
    for doc in docs(tasks.multivalue, given):
        text, question = doc["prompt"].split("\nprint(*")
        name = question.split(")")[0]
        assert sorted(re.findall(rf'(?m)^{name}\.append\("(\w+)"\)$', text)) == sorted(doc["words"])
        assert len(re.findall(r'(?m)^[A-Z]+\.append\("', text)) == 2 * tasks.VALUES


def test_values_stand_in_the_order_of_the_question(given: dict[str, object]) -> None:
    for doc in docs(tasks.multiquery, given):
        text, question = doc["prompt"].split("\nprint(")
        names = question.split(")")[0].split(", ")
        assert [re.search(rf'(?m)^{name}="(\w+)"$', text)[1] for name in names] == doc["words"]


def test_the_chain_is_a_program_that_runs(given: dict[str, object]) -> None:
    for doc in docs(tasks.variables, given):
        assignments = re.findall(r'(?m)^[A-Z]{6}=(?:"[A-Z]{6}"|[A-Z]{6})$', doc["prompt"])
        assert len(assignments) == tasks.CHAINS * (tasks.HOPS + 1)
        names: dict[str, str] = {}
        exec("\n".join(assignments), {}, names)
        value = re.search(r'names that are "(\w+)":$', doc["prompt"])[1]
        assert [name for name in names if names[name] == value] == doc["words"]


def test_the_passage_goes_on_where_its_beginning_stood(given: dict[str, object]) -> None:
    for doc in docs(tasks.copy, given):
        *text, second, first = doc["prompt"].rsplit("\n", 2)
        assert doc["prompt"].count(f"{second}\n{first}{doc['passage']}") == 1
        assert text[0].count(f"{second}\n{first}") == 1


def test_every_fact_is_listed_in_order(given: dict[str, object]) -> None:
    for doc in docs(tasks.count_facts, given):
        text, listed = doc["prompt"].split("\n# all constants, in order\n")
        names = re.findall(r'(?m)^((?:[A-Z][AEIOU])+)="', text)
        lines = [f"# {place} {name}" for place, name in enumerate(names, 1)]
        assert lines == [*listed.split("\n"), *doc["lines"]]


def test_long_answers_have_sixteen_different_syllables(given: dict[str, object]) -> None:
    for doc in docs(tasks.long_recall, given):
        value = doc["answer"].removesuffix('"')
        assert len({value[i : i + 2] for i in range(0, len(value), 2)}) == 16
        assert doc["prompt"].count(value) == 1


def test_positions_predict_the_same_tokens_behind_longer_contexts(given: dict[str, object], checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = docs(tasks.ppl_position, given)
    for near, far in zip(found[::2], found[1::2], strict=True):
        assert (near["length"], far["length"]) == (768, 1024)
        assert (near["target"], near["tokens"]) == (far["target"], far["tokens"])
        assert far["prompt"].endswith(near["prompt"])
        assert near["tokens"] == len(tokenizer(near["target"]).input_ids)
    targets = [doc["target"] for doc in found[::2]]
    assert all(first not in second for first in targets for second in targets if first is not second)


def test_results_are_the_share_that_is_right() -> None:
    doc = {"length": 512, "several_lengths": True, "words": ["LOMU", "KATE"]}
    assert tasks.share_results(doc, [" Kate, and so on"]) == {"found": 0.5, "found_512": 0.5}
    doc = {"several_lengths": False, "passage": "\nabcd"}
    assert tasks.copy_results(doc, ["\nabcd\nefgh"]) == {"copied": 1.0, "exact_match": 1.0}
    assert tasks.copy_results(doc, ["\nabXd"]) == {"copied": 0.6, "exact_match": 0.0}
    doc = {"several_lengths": False, "lines": ["# 3 LOMU", "# 4 KATE", "# 5 BIDI"]}
    assert tasks.count_results(doc, ["\n# 3 LOMU\n# 4 KATE"]) == {"listed": pytest.approx(2 / 3)}
    assert tasks.count_results(doc, ["\n# 4 KATE\n# 5 BIDI"]) == {"listed": 0.0}
    doc = {"several_lengths": False, "tokens": 4}
    assert tasks.position_results(doc, [(-6.0, False)]) == {"nll": 1.5, "token_perplexity": (-6.0, 4)}
