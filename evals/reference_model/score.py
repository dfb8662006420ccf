"""Score a reference model on held-out text: exact answers by length and depth, perplexity by length.

``python -m evals.reference_model.score`` takes some minutes on two cores and writes evals/results/reference_model.json.
Lengths go up to the model's number of positions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.bench.record import command_line
from fasa_flex.lm_eval.haystack import Document, document, heldout_text
from fasa_flex.saving import replace_text

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "reference_model.json"
LENGTHS = (512, 1024, 2048, 4096, 8192)
TARGETS = 128
QUINTILES = 5
BATCH_TOKENS = 16_384


def lengths_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The lengths at which a model is scored, in tokens."""
    return tuple(length for length in LENGTHS if length < model.config.max_position_embeddings)


def documents(tokenizer: PreTrainedTokenizerBase, length: int, n: int, n_facts: int) -> list[Document]:
    """``n`` documents of ``length`` tokens; document i has seed i, and tokens are counted line by line."""

    @cache
    def tokens(line: str) -> int:
        return len(tokenizer.encode(line))

    def count(text: str) -> int:
        return sum(map(tokens, text.splitlines(keepends=True)))

    return [document(Random(i), length=length, count_tokens=count, n_facts=n_facts) for i in range(n)]


@torch.inference_mode()
def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[Document]) -> list[bool]:
    """Whether greedy decoding writes each document's whole answer.

    One forward scores the whole answer: greedy decoding writes it if and only if each of its tokens is the likeliest
    one after the tokens before. Rows are padded on the right, which causal attention does not see.
    """
    prompts = [tokenizer.encode(doc.prompt) for doc in batch]
    answers = [tokenizer.encode(doc.answer) for doc in batch]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    likeliest = model(input_ids=ids, use_cache=False).logits.argmax(-1).tolist()
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(answer)] == answer
        for row, prompt, answer in zip(likeliest, prompts, answers, strict=True)
    ]


def retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, n: int, n_facts: int
) -> dict[str, Any]:
    """Share of exact answers over ``n`` documents with one question each, and by depth of the asked fact."""
    docs = documents(tokenizer, length, n, n_facts)
    size = max(1, BATCH_TOKENS // length)
    right = []
    for start in tqdm(range(0, n, size), desc=f"{length} tokens, {n_facts} facts"):
        right += answered(model, tokenizer, docs[start : start + size])
    quintiles = [int(QUINTILES * doc.depth(doc.asked)) for doc in docs]
    by_depth = [[hit for hit, q in zip(right, quintiles, strict=True) if q == i] for i in range(QUINTILES)]
    return {
        "length": length,
        "n_facts": n_facts,
        "questions": n,
        "exact": sum(right) / n,
        "by_depth": [{"questions": len(hits), "exact": sum(hits) / max(1, len(hits))} for hits in by_depth],
    }


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Perplexity of the same held-out tokens after inputs of growing length.

    At places of the held-out text half of the greatest length apart, the last ``TARGETS`` tokens are predicted from
    inputs of ``TARGETS`` tokens up to the greatest length.
    """
    lengths = lengths_of(model)
    ids = torch.tensor(tokenizer.encode(heldout_text()), device=model.device)
    ends = range(lengths[-1], len(ids) + 1, lengths[-1] // 2)
    rows = []
    for length in (TARGETS, 256, *lengths):
        losses = []
        for end in tqdm(ends, desc=f"perplexity, {length} tokens"):
            window = ids[end - length : end]
            logits = model(input_ids=window[None], use_cache=False, logits_to_keep=TARGETS).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, window[1 - TARGETS :]))
        tokens = len(ends) * (TARGETS - 1)
        rows.append({"length": length, "tokens": tokens, "perplexity": torch.stack(losses).mean().exp().item()})
    return rows


def scores(folder: Path, questions: int, device: torch.device) -> dict[str, Any]:
    """All scores of the model in a folder, with versions and hardware."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        },
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "heldout_sha256": hashlib.sha256(heldout_text().encode()).hexdigest(),
        "parameters": model.num_parameters(),
        "retrieval": [
            retrieval(model, tokenizer, length, questions, n_facts)
            for n_facts in (8, 16)
            for length in lengths_of(model)
        ],
        "perplexity": perplexity(model, tokenizer),
    }


def hardware(device: torch.device) -> str:
    """The device of the scores, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, float32"
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s), float32"


def show(results: dict[str, Any]) -> None:
    """Print the scores, one a line."""
    for row in results["retrieval"]:
        print(f"{row['length']:>5} tokens, {row['n_facts']:>2} facts: {row['exact']:.3f} exact")
    for row in results["perplexity"]:
        print(f"{row['length']:>5} tokens: perplexity {row['perplexity']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--questions", type=int, default=200, help="questions for each length")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = command_line("evals.reference_model.score")
    results = {"command": command, **scores(args.model, args.questions, torch.device(args.device))}
    replace_text(args.out, json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
