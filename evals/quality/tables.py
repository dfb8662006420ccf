"""The tables of evals/README.md, made of the committed results.

python -m evals.quality.tables          # writes them between the README's markers
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.quality.arms import RESULTS, ROOT
from evals.quality.budgets import MEANS, in_all_layers
from evals.quality.methods import BUDGETS, BY_SHARE, METHODS, SHARES
from evals.quality.sweep import Rows, difference

README = ROOT / "evals" / "README.md"
STUDY, LARGE = RESULTS / "study", RESULTS / "study_large"
LIMITS = (0.10, 0.20, 0.35)
"""Shares of the bytes of keys and values at which methods are compared."""
NEEDLE, RECALL, DECODED, LONG, TEXT = (
    "fasa_needle",
    "fasa_recall",
    "fasa_recall, question decoded",
    "fasa_recall_long",
    "fasa_ppl",
)


def compound() -> str:
    """Agreement as in the paper's Table 1."""
    return _compound(_parts("agreement")["compound"]["rows"])


def _compound(rows: Rows) -> str:
    lines = [
        ("random chunks", 8),
        ("StreamingLLM", None),
        ("SnapKV", None),
        ("adjacent pairs", 8),
        ("dominant, calibrated on the other kind", 8),
        *(("dominant", chunks) for chunks in (4, 8, 16)),
        ("dominant, per query head", 8),
    ]
    top_ks = (64, 256, 1024)
    return _table(
        ["keys chosen by", *(f"top {top_k}" for top_k in top_ks)],
        (
            [
                f"{chunks} chunks: {method}" if chunks else method,
                *(_by_kind(rows, method=method, chunks=chunks, top_k=top_k) for top_k in top_ks),
            ]
            for method, chunks in lines
        ),
    )


def transfer() -> str:
    """Planes and adjacent pairs by the length that was calibrated on."""
    rows = _parts("agreement")["transfer"]["rows"]
    lengths = sorted({row["calibration_length"] for row in rows})
    return _table(
        ["8 chunks, top 256, calibrated on documents of", *(f"{length} tokens" for length in lengths)],
        (
            [
                planes,
                *(_by_kind(rows, planes=planes, calibration_length=n, chunks=8, top_k=256) for n in lengths),
            ]
            for planes in ("true planes", "adjacent pairs")
        ),
    )


def held() -> str:
    """Attention that 64 tokens hold: by how a group selects, and with the last keys forced in."""
    parts = _parts("agreement")
    groups = {
        f"8 chunks, group ranked by {how}" if how != "none" else "8 chunks, each query head for itself": _by_kind(
            parts["sharing"]["rows"],
            method="dominant",
            per="kv_head",
            group_reduce=how,
            budget=64,
            figure="attention held",
        )
        for how in ("max", "mean", "softmax", "none")
    }
    forced = {
        words: _by_kind(parts["mass"]["rows"], method=method, budget=64, layer=None)
        for method, words in {
            "FASA, 8 recent forced": "8 chunks, softmax, last 8 keys forced in",
            "sinks + recent": "sinks + recent",
            "oracle": "all chunks, softmax",
        }.items()
    }
    return _table(["64 keys chosen by", "attention held"], (list(item) for item in (groups | forced).items()))


def calibration() -> str:
    """What a profile is worth by what it was calibrated on."""
    arms = {
        (row["method"], row["budget"], row["task"]): row
        for name, part in _parts("calibration").items()
        if name.startswith("lm-eval")
        for row in part["rows"]
    }
    methods = dict.fromkeys(method for method, _, _ in arms)
    return _table(
        [
            "calibrated on",
            *(f"{what}, {budget} tokens" for what in ("needles", "bits per byte") for budget in (16, 32)),
        ],
        (
            [method, *(f"{arms[method, budget, task]['score']:.3f}" for task in (NEEDLE, TEXT) for budget in (16, 32))]
            for method in methods
        ),
    )


def tokens() -> str:
    """All methods at the same tokens."""
    rows = _rows("methods", "tokens")
    cells = [(NEEDLE, 16), (NEEDLE, 64), (DECODED, 16), (DECODED, 64), *((TEXT, n) for n in sorted(BUDGETS))]
    words = {NEEDLE: "needles", DECODED: "question decoded", TEXT: "bits/byte"}
    return _table(
        ["method", *(f"{words[task]}, {budget}" for task, budget in cells)],
        (
            [
                method,
                *(_score(_row(rows, task, method, budget if method != "dense" else None)) for task, budget in cells),
            ]
            for method in ("dense", *METHODS)
        ),
    )


def same_bytes() -> str:
    """All methods at the same bytes: each at the largest budget that reads no more."""
    rows = _rows("methods", "tokens")
    dense = _row(rows, TEXT, "dense")

    def cell(task: str, method: str, limit: float) -> str:
        fitting = [r for r in rows if r["task"] == task and r["method"] == method and r["kv_bytes_share"] <= limit]
        if not fitting:
            return "–"
        best = max(fitting, key=lambda row: row["budget"])
        if task != TEXT:
            return f"{best['score']:.2f} ({best['budget']})"
        more, low, high = difference(best, dense)
        return f"{best['score']:.3f} ({best['budget']}), +{more:.3f} [{low:.3f}, {high:.3f}]"

    return _table(
        [
            "method",
            *(f"needles, ≤ {limit:.0%}" for limit in LIMITS),
            *(f"bits/byte, ≤ {limit:.0%}" for limit in LIMITS),
        ],
        ([method, *(cell(task, method, limit) for task in (NEEDLE, TEXT) for limit in LIMITS)] for method in METHODS),
    )


def shares() -> str:
    """Perplexity by retained share."""
    rows = _rows("methods", "shares")
    dense = _row(rows, "fasa_ppl_position", "dense")

    def cell(method: str, share: float) -> str:
        row = _row(rows, "fasa_ppl_position", method, share)
        more, low, high = difference(row, dense)
        return f"{row['score']:.2f}, {more:+.2f} [{low:.2f}, {high:.2f}], reads {row['kv_bytes_share']:.0%}"

    return _table(
        [f"method (dense: {dense['score']:.2f})", *(f"{share:.0%} of the tokens" for share in SHARES)],
        ([method, *(cell(method, share) for share in SHARES)] for method in BY_SHARE),
    )


def budgets() -> str:
    """Spreads of the budget over layers, and dense layers."""
    rows = in_all_layers(_parts("budgets"))
    ways = [way for way in dict.fromkeys(row["method"] for row in rows) if way != "dense"]
    return _table(
        [
            "budget",
            *(f"needles, {budget}" for budget in MEANS),
            *(f"bits/byte, {budget}" for budget in MEANS),
            *(f"bytes read in all layers, {budget}" for budget in MEANS),
        ],
        (
            [
                way,
                *(_score(_row(rows, task, way, budget)) for task in (NEEDLE, TEXT) for budget in MEANS),
                *(f"{_row(rows, TEXT, way, budget)['kv_bytes_all_layers']:.0%}" for budget in MEANS),
            ]
            for way in ways
        ),
    )


def zero_setup() -> str:
    """Chunks from a prompt against a profile made ahead."""
    parts = _parts("zero_setup")
    names = {"needles": "needles", "text": "nats a token"}
    rows = {(part, row["chunks_from"], row["budget"]): row for part in names for row in parts[part]["rows"]}
    budgets = sorted({budget for _, _, budget in rows})
    return _table(
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
    rows = _parts("large", LARGE)["needles"]["rows"]
    budgets = sorted({row["budget"] for row in rows} - {None})
    tasks = ("needles", "question decoded")
    return _table(
        ["method", *(f"{task}, {budget}" for task in tasks for budget in budgets), "bytes at 64"],
        (
            [
                method,
                *(
                    f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                    for row in (_row(rows, task, method, budget) for task in tasks for budget in budgets)
                ),
                f"{_row(rows, tasks[0], method, 64)['kv_bytes_share']:.1%}",
            ]
            for method in dict.fromkeys(row["method"] for row in rows)
        ),
    )


def large_text() -> str:
    """The large reference model: how far text is above dense attention, in nats a token."""
    rows = _parts("large", LARGE / "cpu")["text"]["rows"]
    budgets = sorted({row["budget"] for row in rows} - {None})
    return _table(
        ["nats a token above dense", *(f"{budget} tokens" for budget in budgets)],
        (
            [
                method,
                *(
                    f"{mean:.3f} [{low:.3f}, {high:.3f}]"
                    for mean, low, high in (_row(rows, "text", method, budget)["above_dense"] for budget in budgets)
                ),
            ]
            for method in dict.fromkeys(row["method"] for row in rows)
            if method != "dense"
        ),
    )


def large_compound() -> str:
    """As `compound`, of the large reference model."""
    return _compound(_parts("large", LARGE / "cpu")["compound"]["rows"])


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        compound,
        transfer,
        held,
        calibration,
        zero_setup,
        tokens,
        same_bytes,
        shares,
        budgets,
        large,
        large_text,
        large_compound,
    )
}


def _parts(name: str, folder: Path = STUDY) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["parts"]
    return parts


def _rows(name: str, sweep: str) -> Rows:
    return [row for part, made in _parts(name).items() if part.startswith(f"{sweep}: ") for row in made["rows"]]


def _row(rows: Rows, task: str, method: str, budget: float | None = None) -> dict[str, Any]:
    """The row of a task, a method and a budget, which dense attention has none of."""
    wanted = (task, method, None if method == "dense" else budget)
    (row,) = (row for row in rows if (row["task"], row["method"], row["budget"]) == wanted)
    return row


def _by_kind(rows: Rows, **wanted: Any) -> str:
    """A figure on steps that answer, and on steps that write text."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    (answer,), (text,) = ([row["mean"] for row in found if row["queries"] == kind] for kind in ("answer", "text"))
    return f"{answer:.3f} / {text:.3f}"


def _score(row: Mapping[str, Any]) -> str:
    """The score, with its interval where it has digits to spare."""
    if row["metric"] != "bits_per_byte":
        return f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['score']:.3f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *lines))


def block(text: str, name: str) -> str | None:
    """What stands between the markers of a table; None without these."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
    return found and found[1].removesuffix("\n")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        if block(text, name) is None:
            raise SystemExit(f"{README} has no place for the table {name}: add <!-- {name} --> and <!-- /{name} -->")
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        behind = rest[rest.index(f"<!-- /{name} -->") :]
        text = f"{before}<!-- {name} -->\n{made()}\n{behind}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
