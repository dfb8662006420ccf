"""``fasa-flex calibrate``: calibrate a model on texts and save its profile."""

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
        out: folder for the profile; checked before calibration starts.
        load: returns the model and its tokenizer.
        texts: texts to calibrate on; None: packaged documents with facts that end on a question, as ``profile=auto``.
        length: most tokens of each text; None: 8192, or the model's maximum.
        top_k: K of contextual agreement; None: 256, or a quarter of a packaged text if that is less.
        max_new_tokens: decode steps of each text; None: 64, or 8 for packaged texts, whose answers are short.

    Raises:
        ValueError: a folder that cannot hold a profile, an unusable text, or a model that FASA does not serve.
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
