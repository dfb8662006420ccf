"""Draw a training log: ``python -m evals.reference_model.curve`` reads the committed log and writes curve.png."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Plot loss on text and share of right answer tokens over training tokens, with the stages marked."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in rows]
    has_text = [i for i, row in enumerate(rows) if row["stage"] not in ("copy", "bare")]
    top.plot([tokens[i] for i in has_text], [rows[i]["text"] for i in has_text], color="tab:blue")
    top.set_ylabel("loss on text, nats per token")
    bottom.plot(tokens, [row["right"] for row in rows], color="tab:orange")
    bottom.set_ylabel("right answer tokens")
    bottom.set_xlabel("training tokens, millions")
    begin = 0.0
    for i, (stage, group) in enumerate(groupby(rows, key=lambda row: row["stage"])):
        end = [*group][-1]["tokens"] / 1e6
        for axis in (top, bottom):
            axis.axvspan(begin, end, color="black", alpha=0.03 + 0.05 * (i % 2), linewidth=0)
        top.annotate(str(stage), ((begin + end) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center")
        begin = end
    bottom.set_xlim(0, begin)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=FOLDER.parent / "results" / "reference_model_training.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER / "curve.png")
    args = parser.parse_args()
    draw([json.loads(line) for line in args.log.read_text().splitlines()], args.out)


if __name__ == "__main__":
    main()
