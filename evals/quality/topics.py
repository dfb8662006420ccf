"""Documents for a real model from Python's language reference, `pydoc_data.topics`, which is part of every Python.

Some topics are for calibration, others are evaluated. The two sets share no passage, although other topics of the
reference repeat each other (``customization`` is a part of ``specialnames``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain, zip_longest
from pydoc_data.topics import topics
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

CALIBRATED = ("debugger", "typesmapping", "assignment", "comparisons", "execmodel", "strings", "import")
REPORTED = ("specialnames", "compound", "types", "formatstrings", "string-methods", "typesseq")

QUESTIONS = 6
CITIES = (
    *("Bremen", "Turin", "Lagos", "Perth", "Izmir", "Osaka", "Tampa", "Minsk", "Quebec", "Malaga", "Lisbon"),
    *("Tokyo", "Nairobi", "Oslo", "Cairo", "Lima", "Quito", "Berlin", "Paris", "London", "Rome", "Madrid"),
)
INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
    "about the numbers afterwards.\n"
)
_DEPTHS = 20  # possible places of a needle in a text


def text_of(name: str) -> str:
    """The text of a topic.

    Raises:
        ValueError: this Python's reference has no such topic.
    """
    if name not in topics:
        raise ValueError(f"this Python's reference has no topic {name!r}; run with Python 3.10 to 3.14.")
    return topics[name]


def sha256_of(names: Iterable[str]) -> str:
    """SHA-256 of the topics' text, which differs between versions of Python."""
    return hashlib.sha256("\0".join(map(text_of, names)).encode()).hexdigest()


def windows(tokenizer: PreTrainedTokenizerBase, names: Iterable[str], length: int) -> list[str]:
    """Texts of ``length`` tokens without overlap: the first of every topic, then the second, and so on."""
    columns = []
    for name in names:
        ids = tokenizer(text_of(name), add_special_tokens=False).input_ids
        starts = range(0, len(ids) - length + 1, length)
        columns.append([tokenizer.decode(ids[start : start + length]) for start in starts])
    return [text for text in chain(*zip_longest(*columns)) if text is not None]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], scored: int) -> list[dict[str, Any]]:
    """Each text as a ``prompt`` and a ``target`` of its last ``scored`` tokens or a few more (``tokens``)."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt = tokenizer.decode(ids[:-scored]).rstrip()  # lm-eval would move whitespace at its end to the target
        tokens = len(ids) - len(tokenizer(prompt, add_special_tokens=False).input_ids)
        rows.append({"prompt": prompt, "target": text[len(prompt) :], "tokens": tokens})
    return rows


def needles(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Texts with six hidden six-digit numbers; a row's ``prompt`` asks for one of them.

    Rows of one text have the same number ``text``. The answer is ``opening`` followed by ``answer``. The cities of a
    text have equally many tokens, so that its prompts have equal lengths and are the same up to the question.
    """
    by_size: dict[int, list[str]] = {}
    for city in CITIES:
        by_size.setdefault(len(tokenizer(f" {city}", add_special_tokens=False).input_ids), []).append(city)
    cities = max(by_size.values(), key=len)
    rows = []
    for number, text in enumerate(texts):
        rng = Random(f"needles/{number}")
        keys = rng.sample(cities if len(cities) >= QUESTIONS else CITIES, QUESTIONS)
        values = [str(rng.randrange(100_000, 1_000_000)) for _ in keys]
        parts, last = [], 0
        for depth, key, value in zip(sorted(rng.sample(range(1, _DEPTHS), QUESTIONS)), keys, values, strict=True):
            end = max(last, text.rfind(" ", last, len(text) * depth // _DEPTHS))  # cuts between words
            parts += [text[last:end], f" The special magic number for {key} is: {value}."]
            last = end
        haystack = INTRODUCTION + "".join(parts) + text[last:]
        for key, value in zip(keys, values, strict=True):
            question = f"What is the special magic number for {key} mentioned in the provided text?"
            opening = f"The special magic number for {key} is:"
            rows.append(
                {"text": number, "prompt": f"{haystack}\n{question}", "opening": opening, "answer": f" {value}"}
            )
    return rows


def needle_results(_: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy: 1 if greedy decoding writes the whole number, else 0."""
    return {"acc": float(results[0][1])}


def continuation_results(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Negative log-likelihood in nats a token."""
    return {"nats": -results[0][0] / row["tokens"]}
