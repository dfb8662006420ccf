"""Scores of FASA on the reference model by the budgets of layers and heads, and by the dense layers.

    python -m evals.quality.budgets          # ten minutes on two cores; --quick: seconds, one arm

The mean budget of sparse layers is the same in every arm. It is spread evenly; falling with depth as in PyramidKV (the
paper's Table 4); rising with depth; or in proportion to the number of keys with nine tenths of a layer's or key/value
head's attention (``agreement.json``, part ``mass``). A dense layer reads all keys: ``kv_bytes_all_layers`` is the share
of bytes read over all layers. Writes ``budgets.json`` and a picture to ``evals/results/study/``; a second start
continues a stopped run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from evals.quality.arms import RESULTS, Arm, PartLedger, provenance, quiet
from evals.quality.methods import RECENT
from evals.quality.pictures import layer_budgets
from evals.quality.sweep import Calibrated, Questions, Rows, sparse_arm, sweep

MEANS = (32, 64)
LAYERS = 4
GROUP = 2
"""Query heads of a key/value head."""
LEAST = 0.05
"""Smallest weight of a layer in the rising spread, PyramidKV's reversed; the mean weight is 1."""
EVEN = "even"
SPREADS = (EVEN, "falling", "rising", "by need of layers", "by need of heads")
DENSE = ("none", "0", "1", "2", "3", "0+1")

QUESTIONS = (Questions({"fasa_needle": 24, "fasa_ppl": 6}),)
QUICK = (Questions({"fasa_needle": 2, "fasa_ppl": 1}, length=512),)


def needs(mass: Rows) -> list[list[float]]:
    """Number of keys with nine tenths of the attention by layer and key/value head, averaged over its query heads.

    Args:
        mass: rows of `evals.quality.agreement.mass`.
    """
    rows = [row for row in mass if row["method"] == "keys for 90 %" and row["layer"] is not None]
    return [
        [
            mean(row["mean"] for row in rows if row["layer"] == layer and row["query_head"] // GROUP == head)
            for head in range(1 + max(row["query_head"] for row in rows) // GROUP)
        ]
        for layer in range(LAYERS)
    ]


def weights(spread: str, dense_layers: str, needed: Sequence[Sequence[float]]) -> str:
    """The argument ``layer_budgets`` of ``fasa_hf``; weights of dense layers are included but ignored."""
    if spread == EVEN:
        return "uniform"
    if spread == "falling":
        return "pyramid"
    if spread == "by need of layers":
        return "+".join(f"{sum(heads):.0f}" for heads in needed)
    if spread == "by need of heads":
        return "+".join(":".join(f"{need:.0f}" for need in heads) for heads in needed)
    sparse = [layer for layer in range(LAYERS) if str(layer) not in dense_layers.split("+")]
    steps = {layer: LEAST + 2 * (1 - LEAST) * place / (len(sparse) - 1) for place, layer in enumerate(sparse)}
    return "+".join(f"{steps.get(layer, 1):.3f}" for layer in range(LAYERS))


def arms(needed: Sequence[Sequence[float]]) -> Iterator[Arm]:
    """Every spread without dense layers and with layer 0 dense; the even spread also with other dense layers."""
    for budget in MEANS:
        for dense_layers in DENSE:
            for spread in SPREADS if dense_layers in ("none", "0") else (EVEN,):
                yield arm(spread, dense_layers, budget, needed)
        for dense_layers in ("none", "0"):
            yield arm(EVEN, dense_layers, budget, needed, n_recent=RECENT)


def arm(spread: str, dense_layers: str, budget: int, needed: Sequence[Sequence[float]], n_recent: int = 0) -> Arm:
    """FASA at a mean budget."""
    words = {"none": "no layer dense", "0+1": "layers 0 and 1 dense"}.get(dense_layers, f"layer {dense_layers} dense")
    forced = f", {n_recent} recent" if n_recent else ""
    return sparse_arm(
        f"{spread}{forced}, {words}",
        budget,
        dense_layers,
        method="fasa",
        layer_budgets=weights(spread, dense_layers, needed),
        n_recent=n_recent,
    )


def in_all_layers(parts: Mapping[str, Any]) -> Rows:
    """The rows of ``budgets.json`` with ``kv_bytes_all_layers``; their own ``kv_bytes_share`` is of sparse layers."""
    rows: Rows = []
    for part in parts.values():
        named = part["settings"]["arguments"].get("dense_layers", "none")
        dense = 0 if named == "none" else len(named.split("+"))
        rows += [
            {**row, "kv_bytes_all_layers": (dense + (LAYERS - dense) * row["kv_bytes_share"]) / LAYERS}
            for row in part["rows"]
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one arm and two documents, to test the script")
    parser.add_argument("--processes", type=int, default=2, help="arms that run at one time (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder (default: evals/results/study)")
    options = parser.parse_args()
    quiet()
    mass = json.loads((RESULTS / "study" / "agreement.json").read_text())["parts"]["mass"]["rows"]
    needed = needs(mass)
    ledger = PartLedger(options.out / "budgets.json", provenance(time.time(), keys_for_90_percent=needed))
    with tempfile.TemporaryDirectory() as folder:
        calibrated = Calibrated.into(Path(folder))
        todo = [arm("rising", "0", 32, needed)] if options.quick else list(arms(needed))
        rows = sweep(ledger, todo, QUICK if options.quick else QUESTIONS, calibrated, options.processes, "budgets")
    layer_budgets(rows).savefig(options.out / "budgets.png", dpi=150)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
