"""Documents and profiles of the agreement study, shared by its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.quality.arms import ANSWER_TOKENS, MODEL
from evals.quality.steps import KINDS, TEXT_TOKENS, TOP_K, Steps, profile_of, steps_of, with_interval
from evals.reference_model.corpus import training_text
from fasa_flex import FasaProfile, RotaryLayout

STEPS = {"answer": ANSWER_TOKENS, "text": TEXT_TOKENS}
"""Decode steps of a document, by kind."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Settings of all rows: lengths in tokens, numbers of documents and of random draws."""

    length: int = 4096
    documents: int = 32
    calibration: int = 8
    draws: int = 10
    calibration_lengths: tuple[int, ...] = (512, 1024, 2048, 4096)


QUICK = Settings(length=1280, documents=2, calibration=2, draws=2, calibration_lengths=(512, 1280))


class Study:
    """Documents and profiles, made when they are first needed.

    Args:
        settings: settings of all rows.
        folder: the model's folder.
        device: device of the model, in float32.
        text: the model's training text; None: that of the running Python.
    """

    def __init__(self, settings: Settings, folder: Path = MODEL, device: str = "cpu", text: str | None = None) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.scaling = self.model.config.head_dim**-0.5
        true = RotaryLayout.detect(self.model)
        self.layouts = {"true planes": true, "adjacent pairs": RotaryLayout.interleaved(true.head_dim)}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.text = training_text() if text is None else text

    @cached_property
    def documents(self) -> list[dict[str, Steps]]:
        """Steps of held-out text, which is in neither training nor calibration."""
        return [self._steps(f"agreement/{number}", self.settings.length) for number in range(self.settings.documents)]

    @cached_property
    def profiles(self) -> dict[tuple[str, str], FasaProfile]:
        """Calibrations by kind of step and pairing of dimensions, on documents of training text."""
        return self.calibrated(self.settings.length, TOP_K)

    def calibrated(self, length: int, top_k: int) -> dict[tuple[str, str], FasaProfile]:
        """As `profiles`, on documents of ``length`` tokens and at ``top_k``."""
        samples = [self._steps(f"calibration/{n}", length, self.text) for n in range(self.settings.calibration)]
        return {
            (kind, pairing): profile_of(self.model, [sample[kind] for sample in samples], layout, top_k)
            for kind in KINDS
            for pairing, layout in self.layouts.items()
        }

    def rows(self, measure: Callable[[str, Steps], dict[Any, Tensor]], *names: str) -> Rows:
        """Rows of ``measure``'s figures over the documents' steps of each kind; ``names`` are its keys' columns."""
        rows: Rows = []
        for kind in KINDS:
            figures = with_interval([measure(kind, document[kind]) for document in self.documents])
            steps = STEPS[kind] * self.settings.documents
            shared = {"queries": kind, "steps": steps}
            rows += [{**shared, **dict(zip(names, key, strict=True)), **figure} for key, figure in figures.items()]
        return rows

    def _steps(self, seed: str, length: int, text: str | None = None) -> dict[str, Steps]:
        return steps_of(self.model, self.tokenizer, seed, length, text)
