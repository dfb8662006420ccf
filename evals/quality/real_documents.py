"""The documents of the study on real models: windows of long texts, and needles in them.

Texts are files, such as books, or `TOPICS`, the language reference that is part of every Python: one third of the
topics is for calibration, the others are evaluated.
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
"""First token of a text's first window, and the distance to the next one, if the text is long enough."""
FRONT_MATTER = 20_000
"""Number of characters at the start of a file that are left out."""
TOPICS = "topics"


class Text(NamedTuple):
    """A text: its name in the results, its identification there, and its token ids."""

    name: str
    sha256: str
    ids: Tensor


class Document(NamedTuple):
    """Token ids with a dense prefix of ``prefix`` and ``scored`` last tokens to score; kind and name in the results."""

    kind: Literal["windows", "needles"]
    name: str
    ids: Tensor
    prefix: int
    scored: int


def read_text(tokenizer: PreTrainedTokenizerBase, source: str, calibrates: bool) -> Text:
    """Read a file, or the topics for calibration or evaluation; single line breaks become spaces."""
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
    """A text of ``length`` tokens with hidden six-digit numbers; the prompt asks for one of them."""
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


def window_starts(tokens: int, length: int, count: int, tail: int) -> list[int]:
    """Starts of at most ``count`` windows of ``length`` tokens in a text of ``tokens``; their tails do not overlap.

    Windows are `STRIDE` tokens or a window's length apart, whichever is more. In a shorter text they are closer, so
    that only prefixes overlap.
    """
    stride = max(STRIDE, length)
    if FIRST_TOKEN + stride * (count - 1) + length <= tokens:
        return [FIRST_TOKEN + stride * number for number in range(count)]
    room = tokens - length
    if room < 0:
        return []
    count = min(count, room // tail + 1)
    return [room * number // max(1, count - 1) for number in range(count)]


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase, books: Sequence[Tensor], length: int, start: Tensor
) -> list[Tensor]:
    """Three passages of text, and three needle prompts that end where the answer begins."""
    rng = random.Random(1)
    texts = [torch.cat([start, rng.choice(books)[1_000 * i :][: length - len(start)]]) for i in (3, 4, 5)]
    prompts = [needle(tokenizer, rng.choice(books), length, seed=77 + i) for i in range(3)]
    return texts + [prompt.ids[: len(prompt.ids) - prompt.scored] for prompt in prompts]


class Documents:
    """All documents of a run, made when they are needed.

    Args:
        tokenizer: the model's.
        texts: the evaluated texts, used in turn.
        tail: sparse tokens of a window, at most half of it.
        start: token ids at the beginning of each window.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], tail: int, start: Tensor) -> None:
        self._tokenizer, self._texts, self._tail, self._start = tokenizer, texts, tail, start

    def windows(self, length: int, count: int) -> int:
        """Number of windows in the texts, at most ``count``."""
        number = 0
        while number < count and self._window(length, count, number) is not None:
            number += 1
        return number

    def make(self, kind: Literal["windows", "needles"], length: int, number: int, count: int) -> Document:
        """Document ``number`` of the ``count`` documents of a kind and length."""
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
