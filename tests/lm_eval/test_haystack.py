"""The fact language: well-posed, of the right length, and a function of its generator."""

from __future__ import annotations

import random
import re

import pytest

from fasa_flex.lm_eval.haystack import MAX_FACTS, SYLLABLES, Fact, document, draw_facts, heldout_text

TEXT = "".join(f"line_{i} = function(argument_{i % 7})\n" for i in range(4000))


def count(text: str) -> int:
    """A tokenizer of sorts: words and signs."""
    return len(re.findall(r"\w+|\s+|[^\w\s]", text))


def test_fact_reads_like_a_constant():
    fact = Fact(key="ZUBAKI", value="LOMUTE")
    assert fact.line == 'ZUBAKI="LOMUTE"'
    assert fact.question + fact.answer == "\n" + fact.line


@pytest.mark.parametrize("seed", range(20))
def test_no_syllable_occurs_twice(seed):
    facts = draw_facts(random.Random(seed), MAX_FACTS)
    words = "".join(fact.key + fact.value for fact in facts)
    syllables = [words[i : i + 2] for i in range(0, len(words), 2)]
    assert len(set(syllables)) == len(syllables)
    assert set(syllables) <= set(SYLLABLES)
    assert {len(fact.key) for fact in facts} <= {4, 6}
    assert {len(fact.value) for fact in facts} == {6}


@pytest.mark.parametrize("n", [0, MAX_FACTS + 1])
def test_number_of_facts_is_checked(n):
    with pytest.raises(ValueError, match="n must be 1 to 16"):
        draw_facts(random.Random(0), n)


@pytest.mark.parametrize("length", [200, 512, 1024, 4096])
@pytest.mark.parametrize("text", [TEXT, None])
def test_prompt_has_the_length_asked_for(length, text):
    for seed in range(10):
        doc = document(random.Random(seed), length=length, count_tokens=count, n_facts=4, text=text)
        assert length - max(2, length // 64) <= count(doc.prompt) <= length


@pytest.mark.parametrize("seed", range(10))
def test_document_is_a_cut_of_the_text_with_fact_lines_put_in(seed):
    doc = document(random.Random(seed), length=1000, count_tokens=count, n_facts=8, text=TEXT)
    lines = doc.text.split("\n")
    told = [line for line in lines if line in {fact.line for fact in doc.facts}]
    assert told == [fact.line for fact in doc.facts]
    assert "\n".join(line for line in lines if line not in told) in TEXT
    assert doc.prompt == doc.text + f'\n{doc.facts[doc.asked].key}="'


def test_facts_lie_anywhere_and_any_of_them_is_asked_for():
    docs = [document(random.Random(seed), length=600, count_tokens=count, n_facts=4, text=TEXT) for seed in range(200)]
    depths = [doc.depth(index) for doc in docs for index in range(4)]
    for fifth in range(5):
        assert 0.15 < sum(fifth <= 5 * depth < fifth + 1 for depth in depths) / len(depths) < 0.25
    assert {doc.asked for doc in docs} == {0, 1, 2, 3}


def test_seed_decides_and_the_global_generator_is_left_alone():
    random.seed(1)
    state = random.getstate()
    first, again, other = (
        document(random.Random(seed), length=400, count_tokens=count, n_facts=4) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert random.getstate() == state


def test_questions_ask_for_different_facts_of_one_haystack():
    doc = document(random.Random(0), length=400, count_tokens=count, n_facts=4)
    asked = doc.questions(random.Random(1), 4)
    assert {fact for _, fact in asked} == set(doc.facts)
    assert all(prompt == doc.text + fact.question for prompt, fact in asked)


def test_text_too_short_for_the_length_is_refused():
    with pytest.raises(ValueError, match="pass a longer text"):
        document(random.Random(0), length=4000, count_tokens=count, n_facts=4, text=TEXT[:5000])


def test_heldout_text_has_no_line_that_reads_like_a_question():
    assert not re.search(r'(?m)^(?:[A-Z][AEIOU]){2,3}="', heldout_text())
