"""Documents of the packaged tasks; their length is counted in tokens of the evaluated model.

lm-eval calls these functions with ``--model_args`` and ``--metadata`` merged into keyword arguments. They read

* ``max_seq_lengths``: lengths in tokens, the answer included (default ``[2048]``);
* ``num_docs``: documents for each length (default 200);
* ``n_facts``: facts in a document (default 8);
* ``tokenizer``, or ``pretrained`` (and ``gguf_file``): the tokenizer that counts tokens.

Document i depends on the task, the length, i and the tokenizer only, since generators are private: a smaller
``--limit`` gives the same first documents. Lengths alternate, so that any limit covers all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import zip_longest
from random import Random
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from fasa_flex.hf.loading import explained_gguf
from fasa_flex.lm_eval import haystack
from fasa_flex.lm_eval.haystack import document, heldout_text

LENGTHS = (2048,)
NUM_DOCS = 200
N_FACTS = 8
QUESTIONS = 4
ANSWER_TOKENS = 16
"""Tokens kept free for the answer, six letters and a quote, at the end of every prompt."""

Document = dict[str, Any]


def needle(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_needle``: several facts in real text, and a question about one of them."""
    return split_of(metadata, _needle)


def recall(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_recall``: as `needle`, with ``QUESTIONS`` questions about each text, one a document."""
    return split_of(metadata, _recall)


def ppl(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_ppl``: the held-out text, cut at line ends into pieces of at most the length."""
    return split_of(metadata, _ppl)


def by_length(doc: Document, name: str, value: float) -> dict[str, float]:
    """The metric under ``name``, and under ``name_length`` if the task has several lengths."""
    return {name: value} | ({f"{name}_{doc['length']}": value} if doc["several_lengths"] else {})


def needle_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Exact match: 1 if the generated value is the fact's, else 0."""
    return by_length(doc, "exact_match", float(results[0].strip() == doc["value"]))


def recall_results(doc: Document, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy: 1 if greedy decoding writes the whole answer; and the answer's negative log-likelihood in nats."""
    ((loglikelihood, is_greedy),) = results
    return by_length(doc, "acc", float(is_greedy)) | by_length(doc, "nll", -loglikelihood)


def needle_single(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_needle_single``: as `needle`, with one fact."""
    return needle(**{**metadata, "n_facts": 1})


def needle_multikey(**metadata: Any) -> dict[str, Dataset]:
    """Documents of ``fasa_needle_multikey``: as `needle`, with `haystack.MAX_FACTS` facts."""
    return needle(**{**metadata, "n_facts": haystack.MAX_FACTS})


def split_of(
    metadata: dict[str, Any], column: Callable[[str, int, int, int], Sequence[Document]]
) -> dict[str, Dataset]:
    """One test split in which the lengths alternate."""
    lengths, tokenizer, num_docs, n_facts = settings(metadata)
    columns = [column(tokenizer, length, num_docs, n_facts) for length in lengths]
    shared = {"several_lengths": len(lengths) > 1}
    rows = [{**doc, **shared} for docs in zip_longest(*columns) for doc in docs if doc is not None]
    return {"test": Dataset.from_list(rows)}


@cache
def _needle(tokenizer: str, length: int, num_docs: int, n_facts: int) -> list[Document]:
    docs = []
    for number in range(num_docs):
        hidden = _hidden(Random(f"needle/{length}/{number}"), tokenizer, length, n_facts)
        fact, depth = hidden.facts[hidden.asked], hidden.depth(hidden.asked)
        docs.append({"length": length, "prompt": hidden.prompt, "value": fact.value, "depth": depth})
    return docs


@cache
def _recall(tokenizer: str, length: int, num_docs: int, n_facts: int) -> list[Document]:
    docs: list[Document] = []
    while len(docs) < num_docs:
        rng = Random(f"recall/{length}/{len(docs)}")
        asked = _hidden(rng, tokenizer, length, n_facts).questions(rng, min(QUESTIONS, n_facts))
        docs += [{"length": length, "prompt": prompt, "answer": fact.answer} for prompt, fact in asked]
    return docs[:num_docs]


@cache
def _ppl(tokenizer: str, length: int, num_docs: int, n_facts: int) -> list[Document]:
    pieces: list[str] = []
    piece, size = "", 0
    for line in heldout_text().splitlines(keepends=True):
        tokens = count(tokenizer, line)
        if piece and size + tokens >= length:  # one token is the prefix
            pieces.append(piece)
            piece, size = "", 0
        piece, size = piece + line, size + tokens
    return [{"length": length, "text": text} for text in pieces[:num_docs]]


def _hidden(rng: Random, tokenizer: str, length: int, n_facts: int) -> haystack.Document:
    counted = partial(count, tokenizer)
    return document(rng, length=length - ANSWER_TOKENS, count_tokens=counted, n_facts=n_facts)


def settings(metadata: dict[str, Any]) -> tuple[list[int], str, int, int]:
    """Lengths, tokenizer, documents for each length and facts in a document, from lm-eval's keyword arguments.

    Raises:
        ValueError: no tokenizer, or a length or number out of range.
    """
    value = metadata.get("max_seq_lengths", LENGTHS)
    lengths = [value] if isinstance(value, int) else list(value)
    if not lengths or not all(isinstance(length, int) and length > 4 * ANSWER_TOKENS for length in lengths):
        raise ValueError(
            f"max_seq_lengths must be whole numbers of tokens above {4 * ANSWER_TOKENS}, got {value!r}; "
            "pass for example --metadata '{\"max_seq_lengths\": [2048]}'."
        )
    tokenizer = tokenizer_of(metadata)
    if tokenizer is None:
        raise ValueError(
            "the packaged tasks count tokens with the model's tokenizer, but no tokenizer was named; "
            'pass --metadata \'{"tokenizer": "<folder or repository>"}\'.'
        )
    num_docs, n_facts = metadata.get("num_docs", NUM_DOCS), metadata.get("n_facts", N_FACTS)
    for name, value in (("num_docs", num_docs), ("n_facts", n_facts)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {value!r}; correct it in --metadata.")
    return lengths, tokenizer, num_docs, n_facts


def tokenizer_of(metadata: dict[str, Any]) -> str | None:
    """The argument of `load_tokenizer`, from lm-eval's keyword arguments; None if they name no tokenizer."""
    named, pretrained, gguf_file = (metadata.get(name) for name in ("tokenizer", "pretrained", "gguf_file"))
    if named is None and isinstance(pretrained, str) and gguf_file is not None:
        return f"{pretrained}/{gguf_file}"
    name = named or pretrained
    return name if isinstance(name, str) else None


@cache
def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a folder, a repository, or a GGUF file in one of these (``FOLDER/FILE.gguf``)."""
    folder, _, file = name.rpartition("/")
    if file.endswith(".gguf"):
        with explained_gguf(folder, file):
            return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return AutoTokenizer.from_pretrained(name)


def count(tokenizer: str, text: str) -> int:
    """Number of tokens of ``text`` under the tokenizer of that name."""
    return len(load_tokenizer(tokenizer)(text).input_ids)
