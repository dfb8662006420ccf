"""Comparison of the library's defaults with its former defaults, on the self-trained models.

    python -m evals.quality.defaults          # half an hour on two cores; --device cuda; --quick: seconds

Profiles are calibrated on training text, as in the study. The tasks are ``needle`` (does greedy decoding write the
answer), ``recall`` (four questions about a text; as in lm-eval, and ``decoded``, with a sparse question) and ``text``
(bits a byte of the last tokens). The dense prefix of a document runs once; every arm continues a copy of its cache in
one forward with sparse queries at its end, which equals decoding. Writes ``defaults.json`` to ``evals/results/``: parts
of a few documents of a task, and for each model a ``summary`` of means and of the differences between the defaults,
with paired 95 % intervals over documents. A second start continues a stopped run.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from evals.quality.arms import (
    ANSWER_TOKENS,
    CALIBRATION_SAMPLES,
    FORMER,
    LENGTH,
    MODEL,
    RESULTS,
    ROOT,
    PartLedger,
    haystack,
    provenance,
    quiet,
)
from evals.quality.steps import with_interval
from evals.reference_model import eight_bits
from evals.reference_model.corpus import training_text
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.lm_eval import documents

LARGE = ROOT / "evals" / "reference_model_large"
BUDGETS = (16, 32, 64, 128, 256)
TASKS = ("needle", "recall", "recall, decoded", "text")
HIGHER_IS_BETTER = {"needle": 1, "recall": 1, "recall, decoded": 1, "text": -1}
DECODED = 16
"""Last tokens of a prompt, with its question, that are sparse in ``recall, decoded``."""
SHARED = 64
"""The length of a dense prefix is a multiple of this, so that questions about one text share it."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A document: token ids [n], the first sparse query, the first scored token, and for text the scored bytes."""

    ids: Tensor
    sparse_from: int
    scored_from: int
    n_bytes: int = 0

    def figure(self, logits: Tensor) -> float:
        """Bits a byte for text, else 1 if all answer tokens are the likeliest; logits from ``scored_from - 1`` on."""
        expected = self.ids[self.scored_from :]
        if not self.n_bytes:
            return float((logits.argmax(-1) == expected).all())
        return float(cross_entropy(logits, expected, reduction="sum")) / (self.n_bytes * math.log(2))


@dataclass(frozen=True)
class Settings:
    """Lengths in tokens, and numbers of documents, which decide a model's rows.

    Attributes:
        length: tokens of a document.
        questions: questions of each task with questions.
        texts: texts to continue.
        scored: last tokens of a text that are scored.
        samples: calibration samples.
        piece: questions of a part.
    """

    length: int = LENGTH
    questions: int = 64
    texts: int = 8
    scored: int = 512
    samples: int = CALIBRATION_SAMPLES
    piece: int = 8


MODELS = {MODEL.name: Settings(), LARGE.name: Settings(8192, 8, 4, samples=2, piece=4)}
QUICK = {MODEL.name: Settings(512, 2, 1, scored=64, samples=1)}


class Trial:
    """A model and its documents."""

    def __init__(self, folder: Path, settings: Settings, device: str) -> None:
        self.folder, self.settings = str(folder), settings
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._prefix = self._ids("")
        self._cache = DynamicCache(config=self.model.config)

    @cached_property
    def profile(self) -> FasaProfile:
        """The profile from the answers to documents of training text that end on a question."""
        text, length = training_text(), self.settings.length - 64
        prompts = [
            haystack(f"calibration/{number}", length, self.tokenizer, text).prompt
            for number in range(self.settings.samples)
        ]
        return calibrate(self.model, prompts, max_new_tokens=ANSWER_TOKENS, progress=False, tokenizer=self.tokenizer)

    def pieces(self, task: str) -> Iterator[range]:
        """The numbers of the documents in each part of a task."""
        count, size = (self.settings.texts, 1) if task == "text" else (self.settings.questions, self.settings.piece)
        return (range(first, min(first + size, count)) for first in range(0, count, size))

    def case(self, task: str, number: int) -> Case:
        """A document of a task."""
        kind, _, decoded = task.partition(", ")
        task_documents = documents.ppl if kind == "text" else getattr(documents, kind)
        counts = max(self.settings.texts, self.settings.questions)
        document = task_documents(max_seq_lengths=[self.settings.length], tokenizer=self.folder, num_docs=counts)[
            "test"
        ][number]
        if kind == "text":
            ids, scored = self._ids(document["text"]), self.settings.scored
            start = len(ids) - scored
            return Case(ids, start - 1, start, n_bytes=len(self.tokenizer.decode(ids[start:]).encode()))
        prompt, answer = document["prompt"], document.get("answer") or f'{document["value"]}"'
        asked = len(self._ids(prompt))
        return Case(self._ids(prompt + answer), asked - (DECODED if decoded else 0), asked)

    @torch.no_grad()
    def measured(self, task: str, number: int) -> dict[str, float]:
        """Each arm's figure for one document."""
        case = self.case(task, number)
        prefix = min(case.sparse_from, case.scored_from - 1) // SHARED * SHARED
        cache = self._prefilled(case.ids[:prefix])

        def logits() -> Tensor:
            held = cache_argument(self.model, copy.deepcopy(cache))
            last: Tensor = self.model(case.ids[None, prefix:-1], **held).logits[0, case.scored_from - 1 - prefix :]
            return last

        figures = {"dense": round(case.figure(logits()), 5)}
        for name, config in arms():
            with enable(self.model, self.profile, config) as fasa, fasa.sparse_from(torch.tensor([case.sparse_from])):
                figures[name] = round(case.figure(logits()), 5)
        return figures

    def _prefilled(self, ids: Tensor) -> DynamicCache:
        """The cache of a dense prefill; the last one is reused if the next document begins alike."""
        if not torch.equal(ids, self._prefix):
            self._prefix, self._cache = ids, DynamicCache(config=self.model.config)
            self.model(ids[None], logits_to_keep=1, **cache_argument(self.model, self._cache))
        return self._cache

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text).input_ids, device=self.model.device)


def arms() -> Iterator[tuple[str, FasaConfig]]:
    """Both defaults at every budget."""
    for budget in BUDGETS:
        yield f"former, {budget}", FasaConfig(n_fac=budget, **FORMER)
        yield f"default, {budget}", FasaConfig(n_fac=budget)


def summary(found: dict[str, list[dict[str, float]]]) -> Rows:
    """A row for each task and budget, from figures by task, document and arm.

    ``better`` is the improvement over the former defaults: mean, low, high; negative if the defaults are worse.
    """
    rows = []
    for task, figures in found.items():
        sign = HIGHER_IS_BETTER[task]
        tensors: list[dict[Any, Tensor]] = [{arm: torch.tensor(value) for arm, value in one.items()} for one in figures]
        for one in tensors:
            better = {b: sign * (one[f"default, {b}"] - one[f"former, {b}"]) for b in BUDGETS}
            one.update({("better", budget): value for budget, value in better.items()})
        intervals = with_interval(tensors)
        rows += [
            {
                "task": task,
                "budget": budget,
                "documents": len(figures),
                "dense": intervals["dense"]["mean"],
                **{name: intervals[f"{name}, {budget}"]["mean"] for name in ("former", "default")},
                "better": [intervals["better", budget][name] for name in ("mean", "low", "high")],
            }
            for budget in BUDGETS
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two short documents of one model, to test the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: evals/results)")
    options = parser.parse_args()
    quiet()
    ledger = PartLedger(options.out / "defaults.json", provenance(time.time()))
    for name, settings in QUICK.items() if options.quick else ((name, MODELS[name]) for name in options.models):
        with tempfile.TemporaryDirectory() as folder:
            if name == LARGE.name:
                eight_bits.unpack(LARGE, Path(folder))
            run(Trial(Path(folder) if name == LARGE.name else MODEL, settings, options.device), name, ledger)


def run(trial: Trial, name: str, ledger: PartLedger) -> None:
    """Measure what is missing in the ledger, and print where the defaults are worse."""
    on_cuda = trial.model.device.type == "cuda"
    settings = {
        **vars(trial.settings),
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "former": FORMER,
        "default": FasaConfig().to_dict(),
    }
    found: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    for task, figures in found.items():
        for piece in trial.pieces(task):
            part = f"{name}: {task}, {piece.start} to {piece.stop - 1}"
            figures += ledger.part(
                part, settings, lambda task=task, piece=piece: [trial.measured(task, number) for number in piece]
            )
            print(f"{part}: {ledger.parts[part]['seconds']} s", flush=True)
    ledger.keep(f"{name}: summary", settings, 0, summary(found))
    for row in ledger.parts[f"{name}: summary"]["rows"]:
        print(row, "WORSE" if row["better"][0] < 0 else "", flush=True)


if __name__ == "__main__":
    main()
