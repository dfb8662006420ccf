"""The reference model with dense attention, with FASA, and with a control, side by side in lm-eval.

    python -m evals.quality.demo          # under ten minutes on two cores; or `nox -s demo`

Calibrates on documents made of text that the tasks never use, then runs the packaged tasks once for each arm. The
control keeps eight sinks and the most recent tokens, at the same budget. Every arm must see the same prompts, and every
sparse arm must have had sparse queries; otherwise the demo stops. Writes ``demo.json``, ``demo.png`` (score against
budget), ``agreement.png`` (what calibration found) and the profile to ``evals/results/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from evals.quality.arms import (
    FORMER,
    LENGTH,
    METRICS,
    N_TIP,
    RESULTS,
    Arm,
    calibrate_reference,
    evaluate,
    prompt_hashes,
    provenance,
    quiet,
    rows_of,
    table,
)
from fasa_flex.plots import chunk_heatmap, score_curves
from fasa_flex.saving import replacing

BUDGETS = (32, 64, 128, 256)
TASKS = {task: (METRICS[task], count) for task, count in {"fasa_needle": 64, "fasa_recall": 32, "fasa_ppl": 4}.items()}
"""Each task's metric and how many of its documents are used."""


def arms(profile: Path) -> list[Arm]:
    """Dense attention, then FASA and the control at every budget."""
    methods = {"FASA": {"method": "fasa"}, "sinks + recent": {"method": "streaming_llm", "n_sink": None}}  # its eight
    sparse = [
        Arm(name, "fasa_hf", budget, {**FORMER, "profile": str(profile), "n_fac": budget, **method})
        for name, method in methods.items()
        for budget in BUDGETS
    ]
    return [Arm("dense", "hf"), *sparse]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, help="at most so many documents of each task (for a quick look)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: evals/results)")
    options = parser.parse_args()
    quiet()
    counts = {task: min(count, options.documents or count) for task, (_, count) in TASKS.items()}

    begun = time.time()
    profile = calibrate_reference(options.out / "profile")
    rows: list[dict[str, Any]] = []
    prompts: dict[str, str] = {}
    todo = arms(options.out / "profile")
    for number, arm in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}, {time.time() - begun:.0f} s] {arm}", flush=True)
        results = evaluate(arm, counts)
        prompts = prompts or prompt_hashes(results)
        if prompt_hashes(results) != prompts:
            sys.exit(f"{arm} saw other prompts than dense attention did: the scores cannot be compared")
        rows += (new := list(rows_of(arm, results)))
        print("   ", ", ".join(f"{row['task']} {row['score']:.3f}" for row in new), flush=True)

    made = provenance(begun, profile=profile.fingerprint, length=LENGTH, n_tip=N_TIP)
    record = {**made, "prompts": prompts, "rows": rows, "table": table(rows)}
    with replacing(options.out) as beside:
        (beside / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
        score_curves(rows).savefig(beside / "demo.png", dpi=150)
        chunk_heatmap(profile, N_TIP, criterion=FORMER["criterion"]).savefig(beside / "agreement.png", dpi=150)
    print(f"\n{record['table']}\n\nwritten to {options.out} after {record['seconds']} s; all arms saw the same prompts")


if __name__ == "__main__":
    main()
