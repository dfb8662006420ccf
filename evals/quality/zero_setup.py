"""Calibration on the prompt compared with a profile made ahead: chunks, scores and time.

    python -m evals.quality.zero_setup          # six minutes on two cores; --quick: seconds

Arms: the shipped profile (``ahead``), a profile from each document's own prompt (``own prompt``), and the first
document's profile for all documents (``first prompt``), as in ``enable(model)``. Parts: ``needles`` (are all tokens of
the answer right, each decoded sparsely after the true ones), ``text`` (nats a token after 1024 tokens of dense
context), ``chunks`` (dominant chunks in common with the profile made ahead) and ``cost`` (increase of the prefill's
time by calibration). The settings of `fasa_flex.calibration.from_prompt` were chosen on other documents. Writes
``zero_setup.json`` to ``evals/results/study/``; a second start continues a stopped run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from evals.quality.arms import FORMER, LENGTH, MODEL, N_TIP, RESULTS, PartLedger, provenance, quiet
from evals.quality.steps import with_interval
from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.lm_eval.documents import needle
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.model.handle import Fasa
from fasa_flex.report import inspection

ARMS = ("ahead", "own prompt", "first prompt")
BUDGETS = (16, 32, 64)
SEEN = 64
"""Number of documents of ``fasa_needle`` on which settings were chosen."""
CONTEXT, SCORED, STRIDE, OFFSET = 1024, 512, 4000, 2000
"""Dense and scored tokens of a window of text, the distance of windows, and the first one's start."""
LENGTHS = (512, 2048, 4096)
ROUNDS = 7

Rows = list[dict[str, Any]]


class Trial:
    """The model, its tokenizer and the profile made ahead."""

    def __init__(self, documents: int) -> None:
        self.documents = documents
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.ahead = FasaProfile.from_pretrained(RESULTS / "profile")

    def prompts(self) -> list[tuple[Tensor, Tensor]]:
        """Prompt and answer of each document, token ids [n] and [m]."""
        split = needle(max_seq_lengths=[LENGTH], tokenizer=str(MODEL), num_docs=SEEN + self.documents)["test"]
        found = []
        for doc in (split[SEEN + number] for number in range(self.documents)):
            prompt, whole = (self._ids(text) for text in (doc["prompt"], f'{doc["prompt"]}{doc["value"]}"'))
            found.append((prompt, whole[len(prompt) :]))
        return found

    def windows(self) -> list[Tensor]:
        """Pieces of the held-out text, token ids [CONTEXT + SCORED]."""
        ids = self._ids(heldout_text())
        starts = range(OFFSET, len(ids) - CONTEXT - SCORED, STRIDE)
        return [ids[start : start + CONTEXT + SCORED] for start in starts][: self.documents]

    def arm(self, name: str, budget: int) -> Fasa:
        """Enable FASA with an arm's chunks."""
        return enable(self.model, self.ahead if name == "ahead" else None, FasaConfig(n_fac=budget, **FORMER))

    def losses(self, fasa: Fasa, name: str, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Logits and loss of the tokens from ``start`` on, whose queries after the context are sparse."""
        if name == "own prompt" and fasa.profile is not None:
            fasa.recalibrate()
        with fasa.sparse_from(torch.tensor([start])):
            logits = self.model(ids[None], use_cache=False).logits[0, start - 1 : -1]
        return logits, F.cross_entropy(logits, ids[start:])

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text).input_ids)


def needles(trial: Trial) -> Rows:
    """Share of documents in which every answer token is right."""
    prompts = trial.prompts()

    def right(name: str, budget: int) -> Iterator[Tensor]:
        with trial.arm(name, budget) as fasa:
            for prompt, answer in prompts:
                logits, _ = trial.losses(fasa, name, torch.cat([prompt, answer]), len(prompt))
                yield (logits.argmax(-1) == answer).all().float()

    return _rows({(name, budget): list(right(name, budget)) for name in ARMS for budget in BUDGETS}, "answered")


def text(trial: Trial) -> Rows:
    """Loss on plain text, in nats a token."""
    windows = trial.windows()

    def loss(name: str, budget: int) -> Iterator[Tensor]:
        with trial.arm(name, budget) as fasa:
            for window in windows:
                yield trial.losses(fasa, name, window, CONTEXT)[1]

    return _rows({(name, budget): list(loss(name, budget)) for name in ARMS for budget in BUDGETS}, "nats a token")


def chunks(trial: Trial) -> Rows:
    """Dominant chunks that a prompt's own profile has in common with the one made ahead."""
    found = []
    with trial.arm("own prompt", max(BUDGETS)) as fasa:
        for prompt, _ in trial.prompts():
            fasa.recalibrate()
            trial.model(prompt[None], use_cache=False)
            assert fasa.profile is not None
            found.append(
                inspection.overlap([trial.ahead, fasa.profile], N_TIP, criterion=FORMER["criterion"])[0, 1].mean()
            )
    return _rows({("own prompt", None): found}, "in common")


def cost(trial: Trial) -> Rows:
    """Times of prefills with and without calibration, interleaved; needs an idle machine."""
    rows = []
    ids = trial._ids(heldout_text())
    for length in LENGTHS:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS + 1):
            for calibrates in (False, True):
                with enable(trial.model, config=FasaConfig(**FORMER)) if calibrates else nullcontext():
                    begun = time.perf_counter()
                    trial.model(ids[None, :length], logits_to_keep=1)
                    times[calibrates].append(time.perf_counter() - begun)
        ratio = median(with_it / without for with_it, without in zip(times[True][1:], times[False][1:], strict=True))
        rows.append(
            {
                "tokens": length,
                "prefill_seconds": round(median(times[False][1:]), 4),
                "calibrating": round(ratio - 1, 4),
                "rounds": ROUNDS,
            }
        )
    return rows


def _rows(found: dict[tuple[str, int | None], list[Tensor]], figure: str) -> Rows:
    count = len(next(iter(found.values())))
    figures = with_interval([{key: values[number] for key, values in found.items()} for number in range(count)])
    return [{"chunks_from": key[0], "budget": key[1], "figure": figure, **row} for key, row in figures.items()]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two documents, to test the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder (default: evals/results/study)")
    options = parser.parse_args()
    quiet()
    trial = Trial(2 if options.quick else 64)
    ledger = PartLedger(options.out / "zero_setup.json", provenance(time.time(), n_tip=N_TIP, length=LENGTH))
    for part in (needles, text, chunks, cost):
        rows = ledger.part(
            part.__name__, {"documents": trial.documents, "budgets": BUDGETS}, lambda part=part: part(trial)
        )
        for row in rows:
            print(part.__name__, row, flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
