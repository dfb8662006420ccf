"""Documents of the packaged tasks with long answers or with questions about several facts.

They read the same ``--metadata`` as `fasa_flex.lm_eval.documents`. Questions about several facts are written as Python
code and comments, so that a model trained on code needs no instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise, takewhile
from random import Random
from typing import Any

from datasets import Dataset

from fasa_flex.lm_eval.documents import Document, by_length, count, settings, split_of
from fasa_flex.lm_eval.haystack import draw_facts, heldout_text, hidden_lines, words

VALUES = 4
"""Values of a multi-value document's key; number of keys that a multi-query document asks for."""

HOPS = 4
CHAINS = 2
LISTED = 12
LONG_VALUE_SYLLABLES = 16
LONG_FACTS = 4
ROOM = 96
"""Tokens kept free for an answer of several words."""

COPIED_TOKENS = 128
COPY_ROOM = 192


def multivalue(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_needle_multivalue``: one list gets several values; the question asks for all of them."""
    return split_of(metadata, _multivalue)


def multiquery(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_needle_multiquery``: one question asks for the values of several names."""
    return split_of(metadata, _multiquery)


def variables(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_variables``: chains of assignments; the question asks for all names with one value."""
    return split_of(metadata, _variables)


def long_recall(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_recall_long``: as ``fasa_recall``, with values of ``LONG_VALUE_SYLLABLES`` syllables."""
    return split_of(metadata, _long_recall)


def copy(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_copy``: the prompt ends with two lines of the text, which the model has to continue."""
    return split_of(metadata, _copy)


def count_facts(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_count``: the model has to list the names of all facts in order, with numbers."""
    return split_of(metadata, _count_facts)


def ppl_position(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_ppl_position``: the same continuation after contexts of every length."""
    lengths, tokenizer, num_docs, _ = settings(metadata)
    longest = max(lengths)
    return split_of(
        metadata, lambda _, length, number, facts: _positions(tokenizer, length, longest, min(lengths), num_docs)
    )


def share_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Share of the words asked for that the answer contains, as in RULER."""
    written = results[0].upper()
    return by_length(doc, "found", sum(word in written for word in doc["words"]) / len(doc["words"]))


def copy_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Share of the passage copied before the first wrong character, and 1 if all of it was copied."""
    pairs = zip(results[0], doc["passage"], strict=False)
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    copied = right / len(doc["passage"])
    return by_length(doc, "copied", copied) | by_length(doc, "exact_match", float(copied == 1))


def count_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Share of the lines that are right in number, name and place."""
    written = [line.strip() for line in results[0].strip("\n").split("\n")]
    right = sum(line == wanted for line, wanted in zip(written, doc["lines"], strict=False))
    return by_length(doc, "listed", right / len(doc["lines"]))


def position_results(doc: Document, results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Negative log-likelihood in nats a token, and the pair (log-likelihood, tokens) for the perplexity."""
    ((loglikelihood, _),) = results
    return by_length(doc, "nll", -loglikelihood / doc["tokens"]) | {"token_perplexity": (loglikelihood, doc["tokens"])}


def _hide(
    rng: Random, tokenizer: str, length: int, lines: list[str], tail: str, answer_tokens: int = ROOM
) -> tuple[str, str]:
    return hidden_lines(rng, lines, length=length - answer_tokens, count_tokens=partial(count, tokenizer), tail=tail)


@cache
def _multivalue(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs = []
    for number in range(num_docs):
        rng = Random(f"multivalue/{length}/{number}")
        word = words(rng)
        key, values = word(3), [word(3) for _ in range(VALUES)]
        others = [(word(3), word(3)) for _ in range(VALUES)]
        lines = [f'{name}.append("{value}")' for name, value in [*((key, value) for value in values), *others]]
        rng.shuffle(lines)
        _, prompt = _hide(rng, tokenizer, length, lines, f"\nprint(*{key})\n# prints")
        docs.append({"length": length, "prompt": prompt, "words": values})
    return docs


@cache
def _multiquery(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs = []
    for number in range(num_docs):
        rng = Random(f"multiquery/{length}/{number}")
        facts = draw_facts(rng, 2 * VALUES)
        asked = rng.sample(facts, VALUES)
        tail = f"\nprint({', '.join(fact.key for fact in asked)})\n# prints"
        _, prompt = _hide(rng, tokenizer, length, [fact.line for fact in facts], tail)
        docs.append({"length": length, "prompt": prompt, "words": [fact.value for fact in asked]})
    return docs


@cache
def _variables(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs = []
    for number in range(num_docs):
        rng = Random(f"variables/{length}/{number}")
        word = words(rng)
        names = [[word(3) for _ in range(HOPS + 1)] for _ in range(CHAINS)]
        values = [word(3) for _ in range(CHAINS)]
        chains = [
            [f'{own[0]}="{value}"', *(f"{b}={a}" for a, b in pairwise(own))]
            for own, value in zip(names, values, strict=True)
        ]
        turns = [chain for chain in range(CHAINS) for _ in range(HOPS + 1)]
        rng.shuffle(turns)  # each chain keeps its order, so that the program runs
        lines = [chains[chain].pop(0) for chain in turns]
        _, prompt = _hide(rng, tokenizer, length, lines, f'\n# all names that are "{values[0]}":')
        docs.append({"length": length, "prompt": prompt, "words": names[0]})
    return docs


@cache
def _long_recall(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs: list[Document] = []
    while len(docs) < num_docs:
        rng = Random(f"recall_long/{length}/{len(docs)}")
        facts = draw_facts(rng, LONG_FACTS, LONG_VALUE_SYLLABLES)
        longest = max((fact.question for fact in facts), key=len)
        text, _ = _hide(rng, tokenizer, length, [fact.line for fact in facts], longest, answer_tokens=40)
        asked = rng.sample(facts, LONG_FACTS)
        docs += [{"length": length, "prompt": text + fact.question, "answer": fact.answer} for fact in asked]
    return docs[:num_docs]


@cache
def _copy(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs: list[Document] = []
    attempt = 0
    while len(docs) < num_docs:
        rng = Random(f"copy/{length}/{attempt}")
        attempt += 1
        text, _ = hidden_lines(
            rng, [], length=length - COPY_ROOM - 48, count_tokens=partial(count, tokenizer), tail="\n"
        )
        lines = text.split("\n")
        start = rng.randrange(1, max(2, len(lines) - 24))
        cue, passage = "\n".join(lines[start : start + 2]), ""
        for line in lines[start + 2 :]:
            if count(tokenizer, passage) >= COPIED_TOKENS:
                break
            passage += f"\n{line}"
        fits = COPIED_TOKENS <= count(tokenizer, passage) <= COPY_ROOM and count(tokenizer, cue) <= 40
        if fits and cue.strip() and text.count(cue) == 1:
            docs.append({"length": length, "prompt": f"{text}\n{cue}", "passage": passage})
    return docs


@cache
def _count_facts(tokenizer: str, length: int, num_docs: int, n_facts: int) -> Sequence[Document]:
    docs = []
    for number in range(num_docs):
        rng = Random(f"count/{length}/{number}")
        facts = draw_facts(rng, LISTED)
        lines = [f"# {place} {fact.key}" for place, fact in enumerate(facts, 1)]
        tail = "\n# all constants, in order\n" + "\n".join(lines[:2])
        _, prompt = _hide(rng, tokenizer, length, [fact.line for fact in facts], tail, answer_tokens=2 * ROOM)
        docs.append({"length": length, "prompt": prompt, "lines": lines[2:]})
    return docs


@cache
def _positions(tokenizer: str, length: int, longest: int, shortest: int, num_docs: int) -> Sequence[Document]:
    """Consecutive windows of the ``longest`` length, with contexts cut to ``length``."""
    wanted = min(256, shortest // 2)
    sizes = [(line, count(tokenizer, line)) for line in heldout_text().splitlines(keepends=True)]
    docs: list[Document] = []
    at = 0
    # the line end belongs to the target: lm-eval would move whitespace from the context's end there anyway
    while len(docs) < num_docs:
        begin, tokens = at, 0
        while at < len(sizes) and tokens + sizes[at][1] < longest - wanted:
            tokens += sizes[at][1]
            at += 1
        while at > begin and sizes[at - 1][0].isspace():  # lm-eval would move it into the target
            at -= 1
            tokens -= sizes[at][1]
        boundary, scored = at, 0
        while at < len(sizes) and scored + sizes[at][1] <= wanted:
            scored += sizes[at][1]
            at += 1
        if at == len(sizes) or scored == 0:
            break
        while tokens + scored >= length:
            tokens -= sizes[begin][1]
            begin += 1
        context = "".join(line for line, _ in sizes[begin:boundary])
        target = "".join(line for line, _ in sizes[boundary:at])
        doc = {"length": length, "prompt": context[:-1], "target": "\n" + target[:-1]}
        docs.append({**doc, "tokens": count(tokenizer, str(doc["target"]))})
    return docs
