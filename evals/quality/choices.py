"""Two choices that the paper leaves open, measured with the packaged tasks on the reference model at two budgets.

    python -m evals.quality.choices          # about six minutes on two cores

How should the query heads of a GQA group rank keys together (``group_reduce``)? And which decode steps should
calibration measure: the five of the answer, or sixteen, of which eleven write source text? Writes ``choices.json`` and
the profile of five steps, which the study and the recipes use, to ``evals/results/``.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from evals.quality.arms import (
    ANSWER_TOKENS,
    FORMER,
    LENGTH,
    N_TIP,
    RESULTS,
    Arm,
    calibrate_reference,
    evaluate,
    provenance,
    quiet,
    rows_of,
    table,
)
from fasa_flex.core.config import GroupReduce
from fasa_flex.saving import replace_text

BUDGETS = (64, 256)
COUNTS = {"fasa_needle": 32, "fasa_recall": 32, "fasa_ppl": 4}
"""Number of documents of each task."""
REDUCTIONS: tuple[GroupReduce, ...] = ("max", "mean", "softmax_exact", "none")
STEPS = (ANSWER_TOKENS, 16)


def main() -> None:
    quiet()
    begun = time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = {ANSWER_TOKENS: RESULTS / "profile", STEPS[1]: Path(folder)}
        profiles = {steps: calibrate_reference(folders[steps], steps) for steps in STEPS}
        choices = [(reduce, ANSWER_TOKENS) for reduce in REDUCTIONS] + [("softmax_exact", STEPS[1])]
        for budget in BUDGETS:
            for reduce, steps in choices:
                arguments = {
                    **FORMER,
                    "profile": str(folders[steps]),
                    "n_fac": budget,
                    "group_reduce": reduce,
                }
                name = f"{reduce}, calibrated on {steps} steps"
                arm = Arm(name, "fasa_hf", budget, arguments)
                print(f"[{time.time() - begun:.0f} s] {arm}", flush=True)
                rows += rows_of(arm, evaluate(arm, COUNTS))
    origin = provenance(begun, profile=profiles[ANSWER_TOKENS].fingerprint, length=LENGTH, n_tip=N_TIP)
    record = {**origin, "rows": rows, "table": table(rows)}
    replace_text(RESULTS / "choices.json", json.dumps(record, indent=1) + "\n")
    print(record["table"])


if __name__ == "__main__":
    main()
