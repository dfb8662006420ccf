"""The tokenizer: byte-level BPE in which every syllable of a fact is one token and no token crosses a line end."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fasa_flex.lm_eval.haystack import MAX_FACTS, draw_facts

PIECES = r"\n|[B-DF-HJ-NPR-TV-Z][AEIOU]| ?[A-Za-z][a-z]*| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+| +|\s"
"""Pieces within which BPE may merge: a line end, a syllable, a word, a number, punctuation, blanks."""

BOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(text: str, vocab_size: int, max_length: int = 4608) -> PreTrainedTokenizerFast:
    """Train on ``text`` and on enough fact lines for every syllable to become a token.

    No special tokens are added, so that encoding two parts split at a line end or at the ``="`` of a question equals
    encoding the whole.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(PIECES), "isolated"), ByteLevel(False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(0)
    facts = "".join(f"{fact.line}\n" for _ in range(len(text) // 2000) for fact in draw_facts(rng, MAX_FACTS))
    tokenizer.train_from_iterator([*text.splitlines(keepends=True), *facts.splitlines(keepends=True)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=max_length,
    )  # fmt: skip


def encode_lines(tokenizer: PreTrainedTokenizerFast, text: str) -> NDArray[np.int64]:
    """Token ids of a long text, encoded line by line, which equals encoding the whole."""
    encodings = tokenizer.backend_tokenizer.encode_batch(text.splitlines(keepends=True))
    return np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in encodings])
