"""Runs all parts of the study, and writes the tables of evals/README.md; also `nox -s study`.

    python -m evals.quality.study          # two hours on two cores; --quick: minutes

A second start continues a stopped run without measuring anything twice. The tables are written for the committed
results only, not for another ``--out``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from evals.quality.arms import RESULTS

PARTS = ("agreement", "calibrations", "methods", "budgets", "zero_setup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few documents and arms, to test the scripts")
    parser.add_argument("--out", type=Path, help="folder (default: evals/results/study)")
    options = parser.parse_args()
    given = [*(["--quick"] if options.quick else []), *(["--out", str(options.out)] if options.out else [])]
    for part in PARTS:
        print(f"--- {part}", flush=True)
        subprocess.run([sys.executable, "-m", f"evals.quality.{part}", *given], check=True)
    if options.out is None or options.out.resolve() == (RESULTS / "study").resolve():
        subprocess.run([sys.executable, "-m", "evals.quality.tables"], check=True)


if __name__ == "__main__":
    main()
