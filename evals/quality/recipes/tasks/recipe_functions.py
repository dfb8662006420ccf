"""The functions that the task files of this folder name: answers in boxes, and windows of WikiText."""

from __future__ import annotations

from typing import Any

import datasets
from lm_eval.tasks.aime import utils as aime
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from fasa_flex.lm_eval.documents import load_tokenizer, tokenizer_of


def boxed_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    r"""Exact match: 1 if the last \boxed{...} is the answer; 0 without a box."""
    target = next(value for name, value in doc.items() if name.lower() == "answer")
    boxed = aime.last_boxed_only_string(results[0])
    try:
        answer = None if boxed is None else aime.remove_boxed(boxed)
    except AssertionError:  # lm-eval raises this for other boxes, such as \fbox
        answer = None
    return {"exact_match": float(answer is not None and aime.is_equiv(answer, str(target)))}


def wikitext_windows(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Windows of `prefill` tokens of context and `decode` tokens to score, counted by the model's tokenizer."""
    name = tokenizer_of(metadata)
    if name is None:
        raise ValueError("WikiText's windows are cut by tokens, but no tokenizer was named; pass it in --metadata.")
    prefill, decode = int(metadata.get("prefill", 8000)), int(metadata.get("decode", 256))
    pages = datasets.load_dataset("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", split="test")
    text = "\n\n".join(wikitext_detokenizer(page) for page in pages)
    return {"test": datasets.Dataset.from_list(windows(text, load_tokenizer(name), prefill, decode))}


def windows(text: str, tokenizer: Any, prefill: int, decode: int) -> list[dict[str, Any]]:
    """Windows of a text, cut at characters where tokens begin, so that encoding them gives the same tokens."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)]
    cut = []
    for first in range(0, len(starts) - 1 - prefill - decode + 1, prefill + decode):
        begin, boundary, end = (starts[first + step] for step in (0, prefill, prefill + decode))
        # lm-eval would move whitespace at a context's end into the continuation
        context = text[begin:boundary].rstrip()
        target = text[begin + len(context) : end]
        cut.append({"prompt": context, "target": target, "tokens": decode})
    return cut


def window_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Perplexity over all decoded tokens, and nats a token."""
    ((loglikelihood, _),) = results
    return {"token_perplexity": (loglikelihood, doc["tokens"]), "nll": -loglikelihood / doc["tokens"]}
