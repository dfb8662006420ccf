"""``fasa-flex calibrate``: a model's profile from texts, into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fasa_flex.calibration.from_texts import calibrate
from fasa_flex.calibration.profile import check_place
from fasa_flex.hf.model_structure import maximum_positions
from fasa_flex.lm_eval.profiles import FACTS, samples_of
from fasa_flex.saving import check_writable


def calibrate_into(
    out: Path,
    load: Callable[[], tuple[Any, Any]],
    texts: Sequence[str] | None,
    length: int | None = None,
    top_k: int | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Calibrate a model and save its profile.

    Args:
        out: folder for the profile, refused before the work if it could not hold one.
        load: gives the model and its tokenizer.
        texts: what is calibrated on; None: documents with facts that end on a question, as ``profile=auto`` takes.
        length: tokens of each at most; None: 8192, or as many as the model takes.
        top_k: K of contextual agreement; None: 256, or a quarter of a packaged text if that is less.
        max_new_tokens: decode steps; None: 64, or 8 for packaged texts, which answer in so many.

    Raises:
        ValueError: a folder or a text that cannot be, or a model that FASA does not serve.
    """
    check_place(out)
    check_writable(out)
    model, tokenizer = load()
    limit = maximum_positions(model) or 8192
    if texts is None:
        texts, packaged = samples_of(FACTS, lambda text: len(tokenizer(text).input_ids), limit)
        top_k, max_new_tokens = top_k or packaged.top_k, max_new_tokens or packaged.steps
    top_k, max_new_tokens = top_k or 256, max_new_tokens or 64
    most = min(length or 8192, limit - max_new_tokens)
    samples = [torch.tensor(tokenizer(text).input_ids, dtype=torch.long)[:most] for text in texts]
    profile = calibrate(model, samples, top_k=top_k, max_new_tokens=max_new_tokens)
    profile.save_pretrained(out)
    print(f"{profile} of {profile.provenance.queries} queries is in {out}; fasa-flex inspect {out} shows it.")
