"""The documents that a real model is measured on: windows of long text, and needles in it.

Texts are files, such as books, or `TOPICS`: the language reference that every Python carries, of which one third of the
topics calibrates and the others are reported on.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CITIES = ["Bremen", "Turin", "Lagos", "Perth", "Izmir", "Osaka", "Tampa", "Minsk", "Quebec", "Malaga", "Lisbon"]
CITIES += ["Tokyo", "Nairobi", "Oslo", "Cairo", "Lima", "Quito"]
FIRST_TOKEN, STRIDE = 12_000, 9_000
"""Where the first window of a text begins, and how far the next one is, where the text is long enough."""
FRONT_MATTER = 20_000
"""Characters at the start of a file that are left out."""
TOPICS = "topics"


class Text(NamedTuple):
    """A text by its name in the results, with what it is known by and its token ids."""

    name: str
    sha256: str
    ids: Tensor


class Document(NamedTuple):
    """Token ids, of which ``prefix`` run densely and the last ``scored`` are scored; kind and name in the results."""

    kind: Literal["windows", "needles"]
    name: str
    ids: Tensor
    prefix: int
    scored: int


def read_text(tokenizer: PreTrainedTokenizerBase, source: str, calibrates: bool) -> Text:
    """A file, or the topics that calibrate or the others; single line breaks as spaces."""
    if source == TOPICS:
        from pydoc_data.topics import topics

        names = sorted(topics)
        chosen = [topics[name] for number, name in enumerate(names) if (number % 3 == 0) == calibrates]
        name, whole = f"{TOPICS}, {'calibration' if calibrates else 'report'}", "\n\n".join(chosen)
        content, text = whole.encode(), whole
    else:
        name, content = Path(source).name, Path(source).read_bytes()
        text = content.decode(errors="replace").replace("\r\n", "\n")
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)[0 if source == TOPICS else FRONT_MATTER :]
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return Text(name, hashlib.sha256(content).hexdigest(), ids)


def needle(
    tokenizer: PreTrainedTokenizerBase, book: Tensor, length: int, seed: int, name: str = "", count: int = 4
) -> Document:
    """Six-digit numbers hidden in a text of ``length`` tokens; the prompt asks for one of them."""
    rng = random.Random(seed)
    start = rng.randrange(min(5_000, len(book) - length - 1), len(book) - length)
    keys = rng.sample(CITIES, count)
    values = [str(rng.randrange(100_000, 999_999)) for _ in keys]
    text, parts, last = book[start : start + length - 220], [], 0
    for place, key, value in zip(sorted(rng.sample(range(1, 20), count)), keys, values, strict=True):
        end = len(text) * place // 20
        parts += [tokenizer.decode(text[last:end]), f" The special magic number for {key} is: {value}. "]
        last = end
    wanted = rng.randrange(count)
    user = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
        f"about the numbers afterwards.\n{''.join(parts)}{tokenizer.decode(text[last:])}\n"
        f"What is the special magic number for {keys[wanted]} mentioned in the provided text?"
    )
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": user}]
        user = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        user = f"{tokenizer.bos_token or ''}{user}\nAnswer: "
    head, opening, answer = (
        tokenizer(part, add_special_tokens=False).input_ids
        for part in (user, f"The special magic number for {keys[wanted]} is:", f" {values[wanted]}")
    )
    return Document("needles", name, torch.tensor(head + opening + answer), len(head), len(answer))


def window_starts(held: int, length: int, count: int, tail: int) -> list[int]:
    """Where windows of ``length`` tokens begin in a text that holds ``held``: at most ``count``, so that no tails meet.

    `STRIDE` tokens apart or a window's length, if that is more; closer, so that only their prefixes meet, where the
    text is too short for that.
    """
    stride = max(STRIDE, length)
    if FIRST_TOKEN + stride * (count - 1) + length <= held:
        return [FIRST_TOKEN + stride * number for number in range(count)]
    room = held - length
    if room < 0:
        return []
    count = min(count, room // tail + 1)
    return [room * number // max(1, count - 1) for number in range(count)]


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase, books: Sequence[Tensor], length: int, start: Tensor
) -> list[Tensor]:
    """Three stretches of text and three needle prompts up to where the answer begins."""
    rng = random.Random(1)
    texts = [torch.cat([start, rng.choice(books)[1_000 * i :][: length - len(start)]]) for i in (3, 4, 5)]
    prompts = [needle(tokenizer, rng.choice(books), length, seed=77 + i) for i in range(3)]
    return texts + [prompt.ids[: len(prompt.ids) - prompt.scored] for prompt in prompts]


class Documents:
    """All documents of a run, made when they are asked for.

    Args:
        tokenizer: the model's.
        texts: those that are reported on, taken in turn.
        tail: tokens of a window that are sparse; at most half of it.
        start: token ids that a window begins with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], tail: int, start: Tensor) -> None:
        self._tokenizer, self._texts, self._tail, self._start = tokenizer, texts, tail, start

    def windows(self, length: int, count: int) -> int:
        """How many of ``count`` windows the texts hold."""
        number = 0
        while number < count and self._window(length, count, number) is not None:
            number += 1
        return number

    def make(self, kind: Literal["windows", "needles"], length: int, number: int, count: int) -> Document:
        """The document of a number, of ``count`` of its kind and length."""
        name = f"{length}/{number}"
        if kind == "needles":
            ids = self._texts[number % len(self._texts)].ids
            return needle(self._tokenizer, ids, length, seed=1_000 * length + number, name=name)
        ids = self._window(length, count, number)
        assert ids is not None
        tail = min(self._tail, length // 2)
        return Document("windows", name, torch.cat([self._start, ids]), length - tail, tail - 1)

    def _window(self, length: int, count: int, number: int) -> Tensor | None:
        taken, of = divmod(number, len(self._texts))
        ids, own = self._texts[of].ids, length - len(self._start)
        each = -(-count // len(self._texts))
        starts = window_starts(len(ids), own, each, min(self._tail, length // 2))
        return ids[starts[taken] :][:own] if taken < len(starts) else None
