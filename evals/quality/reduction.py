"""How should the query heads of a GQA group rank keys as one? The measurement behind ``group_reduce``'s default.

    python -m evals.quality.reduction          # about six minutes on two cores

Runs the packaged tasks on the reference model with every reduction, and with a selection per query head for comparison,
at two budgets. Writes ``group_reduce.json`` to ``evals/results/``.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import get_args

import transformers

from evals.quality.demo import N_TIP, RESULTS, TASKS, Arm, calibrate_reference, evaluate, provenance, rows_of, table
from fasa_flex.config import GroupReduce

BUDGETS = (64, 256)
DOCUMENTS = 32


def main() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begun = time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        profile = calibrate_reference(Path(folder))
        shared = {"profile": folder, "n_tip": N_TIP}
        for budget in BUDGETS:
            for reduce in get_args(GroupReduce):
                arguments = {**shared, "n_fac": budget, "group_reduce": reduce}
                arm = Arm(reduce, "fasa_hf", budget, N_TIP / profile.layout.head_dim, arguments)
                print(f"[{time.time() - begun:.0f} s] {arm}", flush=True)
                rows += rows_of(arm, evaluate(arm, {task: min(DOCUMENTS, count) for task, (_, count) in TASKS.items()}))
    record = {**provenance(begun, profile), "rows": rows}
    (RESULTS / "group_reduce.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
