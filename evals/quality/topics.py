"""Text that every Python carries: its language reference, `pydoc_data.topics`, cut into documents for a real model.

Some topics are calibrated on and others reported on. The topics of the two sets share no passage, although others of
the reference repeat each other (``customization`` is a part of ``specialnames``).
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
_DEPTHS = 20  # places in a text where a needle can stand


def text_of(name: str) -> str:
    """The text of a topic.

    Raises:
        ValueError: this Python's reference has no such topic.
    """
    if name not in topics:
        raise ValueError(f"this Python's reference has no topic {name!r}; run with Python 3.10 to 3.14.")
    return topics[name]


def sha256_of(names: Iterable[str]) -> str:
    """SHA-256 of the topics' text, which differs a little between versions of Python."""
    return hashlib.sha256("\0".join(map(text_of, names)).encode()).hexdigest()


def windows(tokenizer: PreTrainedTokenizerBase, names: Iterable[str], length: int) -> list[str]:
    """Texts of ``length`` tokens that do not overlap: the first of every topic, then the second, and so on."""
    columns = []
    for name in names:
        ids = tokenizer(text_of(name), add_special_tokens=False).input_ids
        starts = range(0, len(ids) - length + 1, length)
        columns.append([tokenizer.decode(ids[start : start + length]) for start in starts])
    return [text for text in chain(*zip_longest(*columns)) if text is not None]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], scored: int) -> list[dict[str, Any]]:
    """Each text in two: a ``prompt``, and its last ``scored`` ``tokens`` or a few more as the ``target``."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt = tokenizer.decode(ids[:-scored]).rstrip()  # lm-eval moves space at a context's end behind it, too
        tokens = len(ids) - len(tokenizer(prompt, add_special_tokens=False).input_ids)
        rows.append({"prompt": prompt, "target": text[len(prompt) :], "tokens": tokens})
    return rows


def needles(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Six six-digit numbers hidden in each text; each is asked for by a ``prompt`` of its own.

    Rows of one text have its number as ``text``. The answer begins with ``opening`` and goes on with ``answer``. The
    cities of a text have equally many tokens, so that its prompts are equal up to the question and as long.
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
            end = max(last, text.rfind(" ", last, len(text) * depth // _DEPTHS))  # between two words
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
    """Whether greedy decoding would write the whole number."""
    return {"acc": float(results[0][1])}


def continuation_results(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Nats a token."""
    return {"nats": -results[0][0] / row["tokens"]}
