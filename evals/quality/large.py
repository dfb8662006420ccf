"""The large reference model at 8192 tokens: agreement of chunks, and scores relative to dense attention by budget.

    python -m evals.reference_model.eight_bits unpack evals/reference_model_large runs/reference_model_large
    python -m evals.quality.large --model runs/reference_model_large     # --device cuda; --quick: seconds

Parts: ``prefill`` (`evals.quality.large_prefill`); ``needles`` (a question about a fact after 8192 tokens; is the
whole answer right), ``text`` (nats a token of the last 256 tokens of a window of text) and ``compound`` (as in
`evals.quality.agreement`). In the first two each document is prefilled once, densely, and every arm continues a copy
of its cache in one forward of sparse queries, which equals decoding token by token. The true answer is fed in: greedy
decoding writes it if and only if each of its tokens is the likeliest. ``question decoded`` is as in evals/README.md:
the prefill ends before the question. Intervals are over documents; those of ``needles`` are cut from one text of some
twenty contexts and overlap, the windows of ``text`` do not. Writes ``large.json`` to ``evals/results/study_large/``;
a second start continues a stopped run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from evals.quality.agreement import N_TIP, RECENT, compound
from evals.quality.arms import ANSWER_TOKENS, FORMER, RESULTS, ROOT, PartLedger, haystack, quiet
from evals.quality.documents import QUICK, Rows, Settings, Study
from evals.quality.large_prefill import prefill
from evals.quality.steps import SINKS, TOP_K, with_interval
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.bench.record import command_line, provenance
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.model.handle import Fasa

MODEL = ROOT / "runs" / "reference_model_large"
BUDGETS = (16, 64, 256, 1024)
SCORED = 256
"""Decoded tokens of a window of text."""
ARMS = ("FASA", f"FASA, {RECENT} recent", "oracle", "random chunks", "sinks + recent")
LARGE = Settings(length=8192, documents=12, calibration=4, draws=3)
ASKED = 32
"""Documents of ``needles``, and most windows of ``text``; more than of ``compound``, since they cost less."""
PARTS = ("needles", "text", "compound", "prefill")


@dataclass(frozen=True)
class Tail:
    """The decoded end of a document.

    Attributes:
        cache: cache of the dense prefill; every arm continues a copy.
        ids: token ids [n] after the prefill.
        expected: token ids [m], the true continuations of the last m of ``ids``.
    """

    cache: Cache
    ids: Tensor
    expected: Tensor


Figure = Callable[[Tensor, Tensor], Tensor]
"""Computes a figure from logits [m, vocabulary] and expected token ids [m]."""


class Trial:
    """The model's documents, and the arms' figures on them.

    Args:
        study: model, tokenizer, texts and settings.
        asked: number of documents with a question.
    """

    def __init__(self, study: Study, asked: int) -> None:
        self.study, self.asked = study, asked

    @cached_property
    def profile(self) -> FasaProfile:
        """The profile from documents of training text that end on a question."""
        settings, tokenizer = self.study.settings, self.study.tokenizer
        samples = [
            haystack(f"calibration/{number}", settings.length - 64, tokenizer, self.study.text).prompt
            for number in range(settings.calibration)
        ]
        model = self.study.model
        return calibrate(model, samples, TOP_K, max_new_tokens=ANSWER_TOKENS, progress=False, tokenizer=tokenizer)

    @cached_property
    def questions(self) -> list[Tail]:
        """Documents of held-out text, whose question and answer are decoded."""
        tails = []
        for number in range(self.asked):
            found = haystack(f"large/{number}", self.study.settings.length, self.study.tokenizer)
            text, prompt, whole = (
                self.tokens(string) for string in (found.text, found.prompt, found.prompt + found.answer)
            )
            tails.append(self._tail(whole, len(text), len(whole) - len(prompt)))
        return tails

    @cached_property
    def windows(self) -> list[Tail]:
        """All windows of held-out text, without overlap."""
        ids, length = self.tokens(heldout_text()), self.study.settings.length
        pieces = ids[: len(ids) // length * length].view(-1, length)[: self.asked]
        return [self._tail(piece, length - SCORED - 1, SCORED) for piece in pieces]

    def arm(self, method: str, budget: int) -> Fasa:
        """Enable a method on the model, without dense layers."""
        config = FasaConfig(n_fac=budget, dense_layers=(), backend="gather", **FORMER)
        if method == "FASA":
            return enable(self.study.model, self.profile, config)
        if method == f"FASA, {RECENT} recent":
            return enable(self.study.model, self.profile, replace(config, n_recent=RECENT))
        if method == "sinks + recent":
            config = replace(config, n_sink=SINKS)
            return enable(self.study.model, config=config, scorer=scorer_factory("streaming_llm"))
        if method == "random chunks":
            scorer = scorer_factory("random_chunks", self.profile, n_tip=N_TIP)
            return enable(self.study.model, config=config, scorer=scorer)
        return enable(self.study.model, config=config, scorer=scorer_factory("oracle"))

    def logits(self, tail: Tail) -> Tensor:
        """Logits of the expected tokens, float32 [m, vocabulary], under the currently enabled method."""
        model = self.study.model
        held = cache_argument(model, copy.deepcopy(tail.cache))
        found = model(tail.ids[None], logits_to_keep=len(tail.expected), **held)
        logits: Tensor = found.logits[0].float()
        return logits

    def measured(self, tails: list[Tail], figure: Figure, sparse: int | None = None) -> Rows:
        """Every arm's figure at every budget, its bytes, and its difference to dense attention.

        Args:
            tails: the documents.
            figure: computes a document's figure.
            sparse: number of sparse last queries; None: all after the prefill.
        """
        found: dict[Any, list[Tensor]] = {("dense", None): [figure(self.logits(tail), tail.expected) for tail in tails]}
        bytes_read: dict[Any, float | None] = {("dense", None): 1.0}
        for method in ARMS:
            for budget in BUDGETS:
                with self.arm(method, budget) as fasa:
                    found[method, budget] = list(self._sparse(fasa, tails, figure, sparse))
                    bytes_read[method, budget] = fasa.stats.kv_bytes_share
        values = {key: torch.stack(figures) for key, figures in found.items()}
        above = {(*key, "above dense"): figures - values["dense", None] for key, figures in values.items()}
        every: dict[Any, Tensor] = {**values, **above}
        by_document = [{key: value[number] for key, value in every.items()} for number in range(len(tails))]
        intervals = with_interval(by_document)
        return [
            {
                "method": method,
                "budget": budget,
                **intervals[method, budget],
                "above_dense": [intervals[method, budget, "above dense"][name] for name in ("mean", "low", "high")],
                "kv_bytes_share": share,
            }
            for (method, budget), share in bytes_read.items()
        ]

    def _sparse(self, fasa: Fasa, tails: list[Tail], figure: Figure, sparse: int | None) -> Iterator[Tensor]:
        for tail in tails:
            first = tail.cache.get_seq_length() + len(tail.ids) - (sparse or len(tail.ids))
            with fasa.sparse_from(torch.tensor([first])):
                yield figure(self.logits(tail), tail.expected)

    def _tail(self, ids: Tensor, start: int, expected: int) -> Tail:
        cache = DynamicCache(config=self.study.model.config)
        self.study.model(ids[None, :start], logits_to_keep=1, **cache_argument(self.study.model, cache))
        return Tail(cache, ids[start:-1], ids[-expected:])

    def tokens(self, text: str) -> Tensor:
        """Token ids of a text, on the model's device."""
        return torch.tensor(self.study.tokenizer(text).input_ids, device=self.study.model.device)


def answered(logits: Tensor, expected: Tensor) -> Tensor:
    """1 if every expected token is the likeliest, else 0."""
    return (logits.argmax(-1) == expected).all().float()


def needles(trial: Trial) -> Rows:
    """Share of right answers, with the question prefilled or decoded."""
    answer = len(trial.questions[0].expected)
    return [
        {"task": task, **row}
        for task, sparse in (("needles", answer - 1), ("question decoded", None))
        for row in trial.measured(trial.questions, answered, sparse)
    ]


def text(trial: Trial) -> Rows:
    """Nats a token of text."""
    return [{"task": "text", **row} for row in trial.measured(trial.windows, F.cross_entropy)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the unpacked model")
    parser.add_argument("--text", type=Path, help="its training text (default: the running Python's library)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="two short documents, to test the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "study_large", help="folder")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    trained_on = options.text.read_text(encoding="utf-8") if options.text else None
    study = Study(QUICK if options.quick else LARGE, options.model, options.device, trained_on)
    trial = Trial(study, 2 if options.quick else ASKED)
    head = provenance(command_line("evals.quality.large"), torch.device(options.device))
    ledger = PartLedger(options.out / "large.json", {**head, "dtype": "float32"})
    settings = {**vars(study.settings), "asked": trial.asked, "n_tip": N_TIP, "calibrated_at": TOP_K}
    parts: dict[str, Callable[[], Rows]] = {
        "needles": lambda: needles(trial),
        "text": lambda: text(trial),
        "compound": lambda: compound(study),
        "prefill": lambda: prefill(trial, SCORED, trial.asked),
    }
    for name in options.parts:
        rows = ledger.part(name, settings, parts[name])
        print(f"{name}: {len(rows)} rows after {ledger.parts[name]['seconds']} s", flush=True)
        for row in rows if name != "compound" else []:
            print({key: value for key, value in row.items() if key != "by_layer"}, flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
