r"""Facts hidden in real Python source, for the packaged tasks and the reference model's training.

A fact is a made-up constant on its own line, ``ZUBAKI="LOMUTE"``. Its question is the beginning of that line,
``\nZUBAKI="``, at the end of the document, and the model has to continue with ``LOMUTE"``. This module uses only the
standard library and generators that the caller passes in, so a seed gives the same documents on every machine.
"""

from __future__ import annotations

import gzip
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random

SYLLABLES = tuple(consonant + vowel for consonant in "BCDFGHJKLMNPRSTVWXYZ" for vowel in "AEIOU")
"""The 100 consonant-vowel pairs of which keys and values consist."""

KEY_SYLLABLES = (2, 3)
VALUE_SYLLABLES = 3
MAX_FACTS = len(SYLLABLES) // (max(KEY_SYLLABLES) + VALUE_SYLLABLES)
"""Most facts of one document, 16, since no syllable occurs twice in its facts."""


@dataclass(frozen=True)
class Fact:
    """A made-up constant: ``key`` of 2 or 3 syllables, ``value`` of 3."""

    key: str
    value: str

    @property
    def line(self) -> str:
        """The fact's line in the haystack, without line end: ``ZUBAKI="LOMUTE"``."""
        return f'{self.key}="{self.value}"'

    @property
    def question(self) -> str:
        r"""The end of the prompt, after the haystack: ``\nZUBAKI="``."""
        return f'\n{self.key}="'

    @property
    def answer(self) -> str:
        """The text that the model must write, closing quote included: ``LOMUTE"``."""
        return f'{self.value}"'


@dataclass(frozen=True)
class Document:
    """Real text with facts on their own lines, and a question about one of them.

    Attributes:
        text: the haystack with its facts, without question and final line end.
        facts: the facts in document order.
        asked: index into ``facts`` of the fact that ``prompt`` asks for.
    """

    text: str
    facts: tuple[Fact, ...]
    asked: int

    @property
    def prompt(self) -> str:
        """The haystack and the question about ``facts[asked]``."""
        return self.ask(self.asked)

    @property
    def answer(self) -> str:
        """The answer to ``prompt``."""
        return self.facts[self.asked].answer

    def ask(self, index: int) -> str:
        """The haystack and the question about ``facts[index]``."""
        return self.text + self.facts[index].question

    def depth(self, index: int) -> float:
        """Where ``facts[index]`` begins, as a share of the haystack's characters (0: at its start)."""
        return f"\n{self.text}\n".index(f"\n{self.facts[index].line}\n") / len(self.text)

    def questions(self, rng: Random, k: int) -> list[tuple[str, Fact]]:
        """``k`` different facts in random order, each after the prompt that asks for it."""
        return [(self.ask(index), self.facts[index]) for index in rng.sample(range(len(self.facts)), k)]


@cache
def heldout_text() -> str:
    """Standard-library source that is not in the reference model's training data (see ``data/README.md``)."""
    return gzip.decompress((files("fasa_flex.lm_eval") / "data" / "heldout.txt.gz").read_bytes()).decode()


def draw_facts(rng: Random, n: int, value_syllables: int = VALUE_SYLLABLES) -> list[Fact]:
    """Draw ``n`` facts in which no syllable occurs twice, so that every question has one answer.

    Args:
        rng: private generator; advanced.
        n: number of facts, 1 to ``MAX_FACTS``; fewer if values are longer.
        value_syllables: syllables of every value.

    Raises:
        ValueError: ``n`` out of range.
    """
    most = len(SYLLABLES) // (max(KEY_SYLLABLES) + value_syllables)
    if not 1 <= n <= most:
        raise ValueError(f"n must be 1 to {most} (no syllable may occur twice), got {n}.")
    word = words(rng)
    return [Fact(key=word(rng.choice(KEY_SYLLABLES)), value=word(value_syllables)) for _ in range(n)]


def words(rng: Random) -> Callable[[int], str]:
    """A function that returns words of a given number of syllables; no syllable is used twice."""
    syllables = iter(rng.sample(SYLLABLES, len(SYLLABLES)))
    return lambda size: "".join(next(syllables) for _ in range(size))


def document(
    rng: Random, *, length: int, count_tokens: Callable[[str], int], n_facts: int, text: str | None = None
) -> Document:
    """Hide ``n_facts`` facts in a random cut of ``text``, each before a line at a uniformly random depth.

    The cut ends at a line end and may begin inside a line. Its size is found by bisection, so that the prompt has at
    most ``length`` tokens and at least ``length - max(2, length // 64)``.

    Args:
        rng: private generator; the draws do not depend on ``length``.
        length: most tokens of ``Document.prompt``.
        count_tokens: number of tokens of a string under the evaluated model's tokenizer.
        n_facts: 1 to ``MAX_FACTS``.
        text: the source to cut from; None is the held-out text.

    Raises:
        ValueError: no cut gives a prompt of that length.
    """
    text = heldout_text() if text is None else text
    facts = draw_facts(rng, n_facts)
    depths = sorted(rng.random() for _ in facts)
    asked, offset = rng.randrange(n_facts), rng.random()

    def hide(cut: str) -> Document:
        return Document(_insert(cut, [fact.line for fact in facts], depths), tuple(facts), asked)

    return hide(_fitting_cut(text, offset, length, lambda cut: count_tokens(hide(cut).prompt), n_facts))


def hidden_lines(
    rng: Random, lines: list[str], *, length: int, count_tokens: Callable[[str], int], tail: str
) -> tuple[str, str]:
    """Hide ``lines`` in a random cut of the held-out text, in their order, each at a uniformly random depth.

    Args:
        rng: private generator; the draws do not depend on ``length``.
        lines: the lines, without line ends.
        length: most tokens of the text with ``tail``, which has at least ``length - max(2, length // 64)``.
        count_tokens: number of tokens of a string under the evaluated model's tokenizer.
        tail: text appended to the cut.

    Returns:
        the text without ``tail``, and with it.

    Raises:
        ValueError: no cut gives a text of that length.
    """
    depths = sorted(rng.random() for _ in lines)
    cut = _fitting_cut(
        heldout_text(), rng.random(), length, lambda cut: count_tokens(_insert(cut, lines, depths) + tail), len(lines)
    )
    text = _insert(cut, lines, depths)
    return text, text + tail


def _fitting_cut(text: str, offset: float, length: int, tokens_with: Callable[[str], int], n_facts: int) -> str:
    """A cut of ``text`` at the relative ``offset`` for which ``tokens_with`` gives about ``length`` tokens."""
    last = text.rindex("\n")
    most = min(8 * length, last)
    end = text.index("\n", most + int(offset * (last - most)))
    slack = max(2, length // 64)
    low, high = 0, most
    while low < high:
        size = (low + high + 1) // 2
        cut = text[end - size : end]
        tokens = tokens_with(cut)
        if length - slack <= tokens <= length:
            return cut
        low, high = (size, high) if tokens < length else (low, size - 1)
    raise ValueError(
        f"no cut of the text ({len(text)} characters) with {n_facts} facts makes a prompt of about {length} tokens; "
        "pass a longer text, another length or fewer facts."
    )


def _insert(text: str, lines: list[str], depths: list[float]) -> str:
    """``text`` with each of ``lines`` inserted before the first line that begins at its depth or later."""
    starts = [0] + [i + 1 for i, char in enumerate(text) if char == "\n"]
    parts, done = [], 0
    for line, depth in zip(lines, depths, strict=True):
        start = starts[min(bisect_left(starts, depth * len(text)), len(starts) - 1)]
        parts += [text[done:start], line, "\n"]
        done = start
    return "".join(parts) + text[done:]
