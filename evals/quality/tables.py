"""The tables of evals/README.md, from the committed results.

python -m evals.quality.tables          # writes them between the README's markers
"""

from __future__ import annotations

from collections.abc import Callable

from evals.marked import fill
from evals.quality.agreement_tables import calibration, compound, held, large_compound, transfer
from evals.quality.arms import RESULTS, ROOT
from evals.quality.budgets import MEANS, in_all_layers
from evals.quality.committed import DECODED, LARGE, NEEDLE, TEXT, markdown, parts_of, row_of, rows_of, score_of
from evals.quality.methods import BUDGETS, BY_SHARE, METHODS, SHARES
from evals.quality.sweep import difference

README = ROOT / "evals" / "README.md"
LIMITS = (0.10, 0.20, 0.35)
"""Shares of the bytes of keys and values for the comparison at equal bytes."""


def defaults() -> str:
    """The former defaults and today's, at the same tokens."""
    parts = parts_of("defaults", RESULTS)
    rows = [(name.split(":")[0], row) for name in parts if name.endswith("summary") for row in parts[name]["rows"]]
    budgets = sorted({row["budget"] for _, row in rows})
    cells = {(model, row["task"], row["budget"]): f"{row['former']:.3f} / {row['default']:.3f}" for model, row in rows}
    dense = {(model, row["task"]): f"{row['dense']:.3f}" for model, row in rows}
    return markdown(
        ["former / today's", "dense", *(f"{budget} tokens" for budget in budgets)],
        (
            [f"{model.replace('_', ' ')}: {task}", dense[model, task], *(cells[model, task, b] for b in budgets)]
            for model, task in dense
        ),
    )


def tokens() -> str:
    """All methods at equal tokens."""
    rows = rows_of("methods", "tokens")
    cells = [(NEEDLE, 16), (NEEDLE, 64), (DECODED, 16), (DECODED, 64), *((TEXT, n) for n in sorted(BUDGETS))]
    words = {NEEDLE: "needles", DECODED: "question decoded", TEXT: "bits/byte"}
    return markdown(
        ["method", *(f"{words[task]}, {budget}" for task, budget in cells)],
        (
            [
                method,
                *(score_of(row_of(rows, task, method, budget)) for task, budget in cells),
            ]
            for method in ("dense", *METHODS)
        ),
    )


def same_bytes() -> str:
    """All methods at equal bytes: each at the largest budget that reads at most as many."""
    rows = rows_of("methods", "tokens")
    dense = row_of(rows, TEXT, "dense")

    def cell(task: str, method: str, limit: float) -> str:
        fitting = [r for r in rows if r["task"] == task and r["method"] == method and r["kv_bytes_share"] <= limit]
        if not fitting:
            return "–"
        best = max(fitting, key=lambda row: row["budget"])
        if task != TEXT:
            return f"{best['score']:.2f} ({best['budget']})"
        more, low, high = difference(best, dense)
        return f"{best['score']:.3f} ({best['budget']}), +{more:.3f} [{low:.3f}, {high:.3f}]"

    return markdown(
        [
            "method",
            *(f"needles, ≤ {limit:.0%}" for limit in LIMITS),
            *(f"bits/byte, ≤ {limit:.0%}" for limit in LIMITS),
        ],
        ([method, *(cell(task, method, limit) for task in (NEEDLE, TEXT) for limit in LIMITS)] for method in METHODS),
    )


def shares() -> str:
    """Perplexity by the share of selected keys."""
    rows = rows_of("methods", "shares")
    dense = row_of(rows, "fasa_ppl_position", "dense")

    def cell(method: str, share: float) -> str:
        row = row_of(rows, "fasa_ppl_position", method, share)
        more, low, high = difference(row, dense)
        return f"{row['score']:.2f}, {more:+.2f} [{low:.2f}, {high:.2f}], reads {row['kv_bytes_share']:.0%}"

    return markdown(
        [f"method (dense: {dense['score']:.2f})", *(f"{share:.0%} of the tokens" for share in SHARES)],
        ([method, *(cell(method, share) for share in SHARES)] for method in BY_SHARE),
    )


def budgets() -> str:
    """Spreads of the budget over layers, and dense layers."""
    rows = in_all_layers(parts_of("budgets"))
    ways = [way for way in dict.fromkeys(row["method"] for row in rows) if way != "dense"]
    return markdown(
        [
            "budget",
            *(f"needles, {budget}" for budget in MEANS),
            *(f"bits/byte, {budget}" for budget in MEANS),
            *(f"bytes read in all layers, {budget}" for budget in MEANS),
        ],
        (
            [
                way,
                *(score_of(row_of(rows, task, way, budget)) for task in (NEEDLE, TEXT) for budget in MEANS),
                *(f"{row_of(rows, TEXT, way, budget)['kv_bytes_all_layers']:.0%}" for budget in MEANS),
            ]
            for way in ways
        ),
    )


def zero_setup() -> str:
    """Chunks calibrated on a prompt, compared with a profile made ahead."""
    parts = parts_of("zero_setup")
    names = {"needles": "needles", "text": "nats a token"}
    rows = {(part, row["chunks_from"], row["budget"]): row for part in names for row in parts[part]["rows"]}
    budgets = sorted({budget for _, _, budget in rows})
    return markdown(
        ["chunks from", *(f"{words}, {budget}" for words in names.values() for budget in budgets)],
        (
            [
                source,
                *(
                    f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                    for row in (rows[part, source, budget] for part in names for budget in budgets)
                ),
            ]
            for source in dict.fromkeys(source for _, source, _ in rows)
        ),
    )


def large() -> str:
    """The large reference model: needles and bytes."""
    rows = parts_of("large", LARGE)["needles"]["rows"]
    budgets = sorted({row["budget"] for row in rows} - {None})
    tasks = ("needles", "question decoded")
    return markdown(
        ["method", *(f"{task}, {budget}" for task in tasks for budget in budgets), "bytes at 64"],
        (
            [
                method,
                *(
                    f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                    for row in (row_of(rows, task, method, budget) for task in tasks for budget in budgets)
                ),
                f"{row_of(rows, tasks[0], method, 64)['kv_bytes_share']:.1%}",
            ]
            for method in dict.fromkeys(row["method"] for row in rows)
        ),
    )


def large_text() -> str:
    """The large reference model: loss on text above that of dense attention, in nats a token."""
    rows = parts_of("large", LARGE / "cpu")["text"]["rows"]
    budgets = sorted({row["budget"] for row in rows} - {None})
    return markdown(
        ["nats a token above dense", *(f"{budget} tokens" for budget in budgets)],
        (
            [
                method,
                *(
                    f"{mean:.3f} [{low:.3f}, {high:.3f}]"
                    for mean, low, high in (row_of(rows, "text", method, budget)["above_dense"] for budget in budgets)
                ),
            ]
            for method in dict.fromkeys(row["method"] for row in rows)
            if method != "dense"
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        compound,
        transfer,
        held,
        calibration,
        zero_setup,
        defaults,
        tokens,
        same_bytes,
        shares,
        budgets,
        large,
        large_text,
        large_compound,
    )
}


def main() -> None:
    fill(README, TABLES)


if __name__ == "__main__":
    main()
