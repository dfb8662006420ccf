"""Training sequences, built from token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fasa_flex.lm_eval.haystack import KEY_SYLLABLES, MAX_FACTS, SYLLABLES, VALUE_SYLLABLES

Ids = NDArray[np.int64]

NOISE, TEXT, ANSWER = 0, 1, 2
"""Role of a token: unpredictable (no loss), ordinary text, or determined by earlier tokens."""

FACT_TOKENS = max(KEY_SYLLABLES) + VALUE_SYLLABLES + 3


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that sequences are built from.

    Attributes:
        size: number of tokens; ids 0 and 1 are the special ones.
        syllables: [100] one id for each syllable.
        assign, quote, newline: The ids of ``="``, ``"`` and the line end.
    """

    size: int
    syllables: Ids
    assign: int
    quote: int
    newline: int

    @classmethod
    def of(cls, encode: Callable[[str], list[int]], size: int) -> Vocabulary:
        """Read the ids off a tokenizer."""
        syllables = [encode(syllable) for syllable in SYLLABLES]
        (assign,), (quote,), (newline,) = encode('="'), encode('"'), encode("\n")
        if any(len(ids) != 1 for ids in syllables):
            raise ValueError("every syllable must be one token; train the tokenizer with train_tokenizer().")
        return cls(size, np.array(syllables, dtype=np.int64)[:, 0], assign, quote, newline)


class Sampler:
    """Draws training sequences from one tokenised text.

    Args:
        text: [n] ids of the text.
        vocabulary: the ids of the fact language.
        bos: id that replaces the first token of every second sequence.
    """

    def __init__(self, text: Ids, vocabulary: Vocabulary, bos: int) -> None:
        self.text, self.vocabulary, self.bos = text, vocabulary, bos
        self.starts = np.flatnonzero(text == vocabulary.newline) + 1

    def batch(self, rng: Generator, kind: str, rows: int, length: int) -> tuple[Ids, Ids]:
        """``rows`` sequences of ``kind``: ids and roles, both [rows, length]."""
        draw = {"copy": self.copy, "echo": self.echo, "bare": self.bare, "facts": self.facts, "final": self.final}[kind]
        ids, roles = zip(*(draw(rng, length) for _ in range(rows)), strict=True)
        batch, role = np.stack(ids), np.stack(roles)
        batch[rng.random(rows) < 0.5, 0] = self.bos
        return batch, role

    def silence(self, rng: Generator, roles: Ids, share: float) -> Ids:
        """``roles`` [rows, length] in which text has a loss only in a random ``share`` of the rows."""
        silent = rng.random((len(roles), 1)) >= share
        return np.where(silent & (roles == TEXT), NOISE, roles)

    def copy(self, rng: Generator, length: int) -> tuple[Ids, Ids]:
        """Random tokens, repeated with a random period of 1/8 to 1/2 of the length."""
        period = int(rng.integers(length // 8, length // 2 + 1))
        return _repeat(rng.integers(2, self.vocabulary.size, period), length, NOISE)

    def echo(self, rng: Generator, length: int) -> tuple[Ids, Ids]:
        """A cut of the text, repeated with a random period of 1/8 to 1/2 of the length."""
        period = int(rng.integers(length // 8, length // 2 + 1))
        return _repeat(self._cut(rng, period), length, TEXT)

    def bare(self, rng: Generator, length: int) -> tuple[Ids, Ids]:
        """Facts and their answered questions with no text between them, cut at ``length``."""
        items = self._items(rng, max(1, min(MAX_FACTS, length // (2 * FACT_TOKENS))), True)
        ids = np.concatenate([ids for _, ids, _ in items])
        roles = np.concatenate([roles for _, _, roles in items])
        return np.resize(ids, length), np.where(np.arange(length) < len(ids), np.resize(roles, length), NOISE)

    def facts(self, rng: Generator, length: int) -> tuple[Ids, Ids]:
        """Text with facts at random depths, and an answered question about each fact at a later depth or at the end."""
        most = min(MAX_FACTS, length // (4 * FACT_TOKENS))
        return self._place(rng, length, self._items(rng, int(rng.integers(1, most + 1)), bool(rng.integers(0, 2))))

    def final(self, rng: Generator, length: int, n_facts: int = 8) -> tuple[Ids, Ids]:
        """Sequences as in the tasks: ``n_facts`` facts in text and one answered question at the end."""
        items = self._items(rng, n_facts, False)
        kept = [item for item in items if item[0] < 1.0] + [item for item in items if item[0] == 1.0][:1]
        return self._place(rng, length, kept)

    def _items(self, rng: Generator, n: int, interleave: bool) -> list[tuple[float, Ids, Ids]]:
        """``n`` facts and their answered questions as (depth, ids, roles), sorted by depth."""
        syllables = iter(rng.permutation(self.vocabulary.syllables))
        items = []
        for _ in range(n):
            key = [next(syllables) for _ in range(int(rng.integers(KEY_SYLLABLES[0], KEY_SYLLABLES[1] + 1)))]
            value = [next(syllables) for _ in range(VALUE_SYLLABLES)]
            ids = np.array([*key, self.vocabulary.assign, *value, self.vocabulary.quote, self.vocabulary.newline])
            fact_roles = np.array([NOISE] * len(key) + [TEXT] + [NOISE] * len(value) + [TEXT, TEXT])
            asked = np.array([NOISE] + [ANSWER] * (len(key) + len(value) + 1) + [TEXT])
            depth = float(rng.random())
            later = depth + (1 - depth) * float(rng.random()) if interleave else 1.0
            items += [(depth, ids, fact_roles), (later, ids, asked)]
        order = rng.permutation(len(items)) if not interleave else range(len(items))
        return sorted((items[i] for i in order), key=lambda item: item[0])

    def _place(self, rng: Generator, length: int, items: list[tuple[float, Ids, Ids]]) -> tuple[Ids, Ids]:
        """A cut of the text that ends at a line end, with each item inserted before the first line after its depth."""
        size = length - sum(len(ids) for _, ids, _ in items)
        first = int(np.searchsorted(self.starts, size))
        end = int(self.starts[rng.integers(first, len(self.starts))])
        starts = self.starts[np.searchsorted(self.starts, end - size) : np.searchsorted(self.starts, end) + 1]
        ids, roles, done = [], [], end - size
        for depth, item, role in items:
            start = int(starts[np.searchsorted(starts, end - size + depth * size)])
            ids += [self.text[done:start], item]
            roles += [np.full(start - done, TEXT), role]
            done = start
        ids.append(self.text[done:end])
        roles.append(np.full(end - done, TEXT))
        return np.concatenate(ids), np.concatenate(roles)

    def _cut(self, rng: Generator, size: int) -> Ids:
        start = int(rng.integers(0, len(self.text) - size))
        return self.text[start : start + size]


def _repeat(ids: Ids, length: int, role: int) -> tuple[Ids, Ids]:
    """``ids`` repeated; the role is ``role`` in the first period and the next token, then ANSWER."""
    return np.resize(ids, length), np.where(np.arange(length) <= len(ids), role, ANSWER)
