"""Profiles of the reference model by number and kind of calibration samples and by K: their chunks and scores.

    python -m evals.quality.calibrations          # ten minutes on an idle core; --quick: seconds, without lm-eval

Samples are documents of training text, each calibrated alone: a profile of n samples is the mean of n such tables, as
in `fasa_flex.calibrate`. ``recall`` samples end on a question and give the steps of the answer, ``text`` samples end
within the source and give steps that continue it, ``mixed`` ones are half of each. If there are enough samples, a
setting has several profiles of disjoint samples, at most `SUBSETS`. Writes ``calibration.json`` and a picture to
``evals/results/study/``; a second start continues a stopped run.

Parts: ``overlaps`` (dominant chunks in common; the paper's Table 10), ``worth`` (agreement, and attention on selected
keys, of held-out documents; Table 5 for K) and one for each arm of lm-eval (needles and perplexity at small budgets).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.quality.arms import (
    ANSWER_TOKENS,
    FORMER,
    LENGTH,
    MODEL,
    N_TIP,
    RESULTS,
    Arm,
    PartLedger,
    evaluate,
    haystack,
    provenance,
    quiet,
    rows_of,
)
from evals.quality.pictures import calibration_curves
from evals.quality.steps import (
    KINDS,
    TEXT_TOKENS,
    TOP_K,
    attention,
    dominant,
    held,
    oracle,
    overlap,
    ranked,
    scored,
    shared_ranking,
    steps_of,
    valid_of,
    with_interval,
)
from evals.reference_model.corpus import training_text
from fasa_flex import FasaProfile, calibrate
from fasa_flex.lm_eval.haystack import Document
from fasa_flex.report import inspection

SOURCES = ("recall", "text", "mixed")
SUBSETS = 4
TOP_K_SAMPLES = 4
"""Number of samples of the profiles that differ in K."""
COMPARED = (64, 256)
"""K of the reported agreement."""
BUDGETS = (16, 64, 256)
"""Numbers of selected tokens whose attention is reported."""
COUNTS = {"fasa_needle": 64, "fasa_ppl": 4}
ARM_BUDGETS = (16, 32)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Settings of all rows; ``length`` is the number of tokens of the held-out documents."""

    samples: tuple[int, ...] = (1, 2, 4, 8, 16)
    top_ks: tuple[int, ...] = (16, 64, 128, 256, 512)
    documents: int = 16
    length: int = 4096


QUICK = Settings(samples=(1, 2), top_ks=(64, 256), documents=2, length=1280)


@dataclass(frozen=True)
class Setting:
    """One way to calibrate: kind and number of samples, and K."""

    calibrated_on: str
    samples: int
    calibration_top_k: int = TOP_K

    def __str__(self) -> str:
        return f"{self.calibrated_on}, {self.samples} samples, K = {self.calibration_top_k}"


ARMS = (
    Setting("recall", 1),
    Setting("recall", 4),
    Setting("text", 4),
    Setting("mixed", 4),
    Setting("recall", 4, calibration_top_k=64),
)


class Calibrations:
    """Profiles of single samples, calibrated when they are needed, and their means."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(MODEL)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self._text = training_text()
        self.single = cache(self._single)
        self._document = cache(self._haystack)

    def all(self) -> Iterator[Setting]:
        """All settings."""
        for source in SOURCES:
            yield from (Setting(source, n) for n in self.settings.samples if source != "mixed" or n > 1)
        few = min(TOP_K_SAMPLES, max(self.settings.samples))
        yield from (Setting(source, few, k) for source in SOURCES[:2] for k in self.settings.top_ks if k != TOP_K)

    def profiles(self, setting: Setting) -> list[FasaProfile]:
        """Profiles of disjoint samples for one setting, at most `SUBSETS`."""
        most = max(self.settings.samples) // setting.samples
        return [self._mean(setting, subset * setting.samples) for subset in range(min(SUBSETS, most))]

    def _mean(self, setting: Setting, first: int) -> FasaProfile:
        """The profile of the samples ``first``, ``first + 1``, ...; mixed ones alternate between the kinds."""
        kinds = SOURCES[:2] if setting.calibrated_on == "mixed" else (setting.calibrated_on,)
        parts = [
            self.single(kinds[number % len(kinds)], number, setting.calibration_top_k)
            for number in range(first, first + setting.samples)
        ]
        provenance = replace(
            parts[0].provenance,
            queries=sum(part.provenance.queries for part in parts),
            sample_hashes=tuple(sample for part in parts for sample in part.provenance.sample_hashes),
        )
        return FasaProfile(torch.stack([part.agreement for part in parts]).mean(0), parts[0].layout, provenance)

    def _single(self, source: str, number: int, top_k: int) -> FasaProfile:
        found = self._document(number)
        sample, steps = (found.prompt, ANSWER_TOKENS) if source == "recall" else (found.text, TEXT_TOKENS)
        return calibrate(self.model, [sample], top_k, steps, progress=False, tokenizer=self.tokenizer)

    def _haystack(self, number: int) -> Document:
        return haystack(f"calibration/{number}", LENGTH - 64, self.tokenizer, self._text)


def overlaps(calibrations: Calibrations) -> Rows:
    """Dominant chunks in common, between the settings' first profiles and between the profiles of one setting."""
    settings = list(calibrations.all())
    firsts = inspection.overlap(
        [calibrations.profiles(setting)[0] for setting in settings], N_TIP, criterion=FORMER["criterion"]
    )
    rows = [
        {"one": str(settings[a]), "other": str(settings[b]), **_common(firsts[a, b])}
        for a, b in combinations(range(len(settings)), 2)
    ]
    for setting in settings:
        profiles = calibrations.profiles(setting)
        if len(profiles) > 1:
            shared = inspection.overlap(profiles, N_TIP, criterion=FORMER["criterion"])
            pairs = torch.stack([shared[a, b] for a, b in combinations(range(len(profiles)), 2)])
            others = f"{setting}, other samples"
            rows.append({"one": str(setting), "other": others, "profiles": len(profiles), **_common(pairs.mean(0))})
    return rows


def worth(calibrations: Calibrations) -> Rows:
    """Agreement and attention of a setting's profiles on held-out documents: mean, worst and best profile."""
    length, count = calibrations.settings.length, calibrations.settings.documents
    documents = [steps_of(calibrations.model, calibrations.tokenizer, f"worth/{n}", length) for n in range(count)]
    scaling = calibrations.model.config.head_dim**-0.5
    profiles = {setting: calibrations.profiles(setting) for setting in calibrations.all()}
    rows = []
    for kind in KINDS:
        measured: list[dict[Any, Tensor]] = []
        for steps in (document[kind] for document in documents):
            valid, weights = valid_of(steps), attention(steps, scaling)
            full = ranked(scored(oracle, steps), valid)
            figures = {}
            for setting, several in profiles.items():
                for number, profile in enumerate(several):
                    scores = scored(dominant(profile, N_TIP), steps)
                    alone = ranked(scores, valid)
                    shared = ranked(shared_ranking(scores, valid, scaling), valid)
                    for top_k in COMPARED:
                        figures[setting, number, f"agreement on the top {top_k}"] = overlap(full, alone, top_k)
                    for budget in BUDGETS:
                        figures[setting, number, f"attention held by {budget}"] = held(weights, shared, budget)
            measured.append(figures)
        rows += list(_over_profiles(measured, kind))
    return rows


def arm_rows(calibrations: Calibrations, setting: Setting, budget: int) -> Rows:
    """One arm of lm-eval: FASA with the setting's first profile."""
    profile = calibrations.profiles(setting)[0]
    with tempfile.TemporaryDirectory() as folder:
        profile.save_pretrained(folder)
        arguments = {**FORMER, "profile": folder, "n_fac": budget}
        arm = Arm(str(setting), "fasa_hf", budget, arguments)
        return list(rows_of(arm, evaluate(arm, COUNTS)))


def _over_profiles(measured: Sequence[dict[Any, Tensor]], kind: str) -> Iterator[dict[str, Any]]:
    """Rows by (setting, profile, name): intervals of the mean over a setting's profiles, and the profiles' range."""
    keys = list(dict.fromkeys((setting, name) for setting, _, name in measured[0]))
    numbers = {key: [n for setting, n, name in measured[0] if (setting, name) == key] for key in keys}
    means = [
        {key: torch.stack([figures[key[0], n, key[1]] for n in numbers[key]]).mean(0) for key in keys}
        for figures in measured
    ]
    for (setting, name), figure in with_interval(means).items():
        each = [
            float(torch.stack([figures[setting, n, name] for figures in measured]).mean())
            for n in numbers[setting, name]
        ]
        yield {
            "queries": kind,
            **vars(setting),
            "figure": name,
            **figure,
            "profiles": len(each),
            "poorest": round(min(each), 4),
            "best": round(max(each), 4),
        }


def _common(shared: Tensor) -> dict[str, Any]:
    return {"in_common": round(float(shared.mean()), 4), "by_layer": [round(x, 4) for x in shared.tolist()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples and documents, to test the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder (default: evals/results/study)")
    options = parser.parse_args()
    quiet()
    calibrations = Calibrations(QUICK if options.quick else Settings())
    shared = {"n_tip": N_TIP, "calibration_length": LENGTH - 64, "steps": [ANSWER_TOKENS, TEXT_TOKENS]}
    settings = {**vars(calibrations.settings), **shared, "subsets": SUBSETS}
    ledger = PartLedger(options.out / "calibration.json", provenance(time.time(), chance=N_TIP / 32))
    ledger.part("overlaps", settings, lambda: overlaps(calibrations))
    rows = ledger.part("worth", settings, lambda: worth(calibrations))
    calibration_curves(rows).savefig(options.out / "calibration.png", dpi=150)
    for setting in () if options.quick else ARMS:
        for budget in ARM_BUDGETS:
            name = f"lm-eval: {setting}, {budget} tokens"
            scores = ledger.part(
                name,
                {**shared, "length": LENGTH, "counts": COUNTS},
                lambda setting=setting, budget=budget: arm_rows(calibrations, setting, budget),
            )
            print(name, ", ".join(f"{row['task']} {row['score']:.3f}" for row in scores), flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
