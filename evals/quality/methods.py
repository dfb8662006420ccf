"""Scores of all methods at equal budgets in tokens and in bytes, on the packaged tasks with the reference model.

    python -m evals.quality.methods          # forty minutes on two cores; --quick: a minute, two arms

Measures scores at five budgets, and perplexity by the share of selected keys. All methods use the same documents and
the same selection code, count bytes by `fasa_flex.core.bytes_read`, and have no dense layers (Quest's paper has two).
The tasks are `QUESTIONS`. In ``fasa_recall, question decoded`` the prefill ends 16 tokens before the prompt's end, as
in a second turn of a chat, so that evicted keys are missing when the question comes. Perplexity by share is as in the
paper, a dense prefill and 256 teacher-forced steps, with 4096 tokens of prefill instead of 8000, since the model has
4608 positions. Writes ``methods.json`` and pictures to ``evals/results/study/``; a second start continues a stopped
run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.quality.arms import RESULTS, Arm, PartLedger, provenance, quiet
from evals.quality.pictures import scores_by_budget, scores_by_share
from evals.quality.sweep import Calibrated, Questions, sparse_arm, sweep

BUDGETS = (64, 16, 256, 32, 128)
SHARES = (0.1, 0.2, 0.4, 0.6)
RECENT = 8
PAGE = 16

METHODS: dict[str, dict[str, Any]] = {
    "FASA": {"method": "fasa"},
    f"FASA, {RECENT} recent": {"method": "fasa", "n_recent": RECENT},
    "oracle": {"method": "oracle"},
    "SparQ": {"method": "sparq"},
    "Double Sparsity": {"method": "double_sparsity"},
    "adjacent pairs": {"method": "adjacent_pairs"},
    "random chunks": {"method": "random_chunks"},
    "Quest": {"method": "quest"},
    "sinks + recent": {"method": "streaming_llm", "n_sink": None},
    "SnapKV": {"method": "snapkv"},
    "R-KV": {"method": "rkv"},
    "H2O": {"method": "h2o"},
}
"""Arguments of ``fasa_hf`` in addition to `FORMER`; ``n_sink`` None is eight sinks."""
OPEN_PAGE = "Quest, open page competes"
"""Quest without the rule that the page being written is always selected."""
BY_SHARE = ("FASA", f"FASA, {RECENT} recent", "oracle", "SparQ", "Quest", "sinks + recent", "SnapKV")

CHECKS = (
    sparse_arm("SnapKV, 200 recent", 0.1, method="snapkv", n_recent=200),
    sparse_arm("FASA, layer 0 dense", 0.4, "0", method="fasa"),
    sparse_arm("oracle, layer 0 dense", 0.4, "0", method="oracle"),
)
"""Arms that explain other perplexities: SnapKV's loss by its window, the oracle's loss in diffuse heads."""

QUESTIONS = (
    Questions({"fasa_needle": 24, "fasa_recall": 16, "fasa_recall_long": 8, "fasa_ppl": 6}),
    Questions({"fasa_recall": 16}, arguments={"sparse_tail": 16}, suffix=", question decoded"),
)
POSITIONS = (Questions({"fasa_ppl_position": 8}, length=4096 + 256),)
QUICK = (Questions({"fasa_needle": 2, "fasa_ppl": 1}, length=512),)


def arm(method: str, budget: int | float) -> Arm:
    """A method at a budget; Quest always selects the page being written, up to half of the budget."""
    arguments = dict(METHODS[method])
    if method == "Quest":
        arguments["n_recent"] = min(PAGE, budget // 2) if isinstance(budget, int) else PAGE
    return sparse_arm(method, budget, **arguments)


def arms() -> Iterator[Arm]:
    """Every method at every budget."""
    for budget in BUDGETS:
        yield from (arm(method, budget) for method in METHODS)
    yield sparse_arm(OPEN_PAGE, 64, method="quest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two arms and two documents, to test the script")
    parser.add_argument("--processes", type=int, default=2, help="arms that run at one time (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder (default: evals/results/study)")
    options = parser.parse_args()
    quiet()
    ledger = PartLedger(options.out / "methods.json", provenance(time.time(), recent=RECENT, dense_layers=[]))
    with tempfile.TemporaryDirectory() as folder:
        calibrated = Calibrated.into(Path(folder))
        if options.quick:
            few = [arm("FASA", 32), arm("SnapKV", 32)]
            rows = sweep(ledger, few, QUICK, calibrated, options.processes, "tokens")
        else:
            rows = sweep(ledger, list(arms()), QUESTIONS, calibrated, options.processes, "tokens")
            by_share = [arm(method, share) for share in SHARES for method in BY_SHARE]
            shares = sweep(ledger, [*by_share, *CHECKS], POSITIONS, calibrated, options.processes, "shares")
            scores_by_share(shares).savefig(options.out / "shares.png", dpi=150)
    scores_by_budget(rows).savefig(options.out / "methods.png", dpi=150)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
