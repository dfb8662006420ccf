"""Pictures of the study's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from evals.quality.sweep import POOLED, difference
from fasa_flex.report.plots import COLOURS

Rows = Sequence[Mapping[str, Any]]

STEPS = {"answer": "steps that answer", "text": "steps that write text"}
_CHUNK_METHODS = (
    "dominant",
    "dominant, per query head",
    "dominant, calibrated on the other kind",
    "adjacent pairs",
    "random chunks",
)
_STATIC_METHODS = ("SnapKV", "StreamingLLM", "random keys")
_DENSE = "0.35"
_LOOKS = {
    "oracle": (_DENSE, "D", "-"),
    "FASA": (COLOURS[0], "o", "-"),
    "FASA, 8 recent": (COLOURS[0], "o", "-"),
    "SparQ": (COLOURS[2], "s", "-"),
    "Double Sparsity": (COLOURS[2], "s", "-"),
    "adjacent pairs": (COLOURS[3], "v", "-"),
    "random chunks": ("0.6", "x", "-"),
    "Quest": (COLOURS[4], "P", "-"),
    "sinks + recent": (COLOURS[1], "^", "--"),
    "SnapKV": ("#111111", "s", "--"),
    "R-KV": ("#c2558f", "d", "--"),
    "H2O": ("#7a4a2b", "*", "--"),
}
"""Colour, marker and line of each method; methods that evict or ignore keys have dashed lines."""
_OPEN = ("FASA, 8 recent", "Double Sparsity", "SnapKV")
_LINEAR = 0.01
"""Differences to dense attention up to this are on a linear scale, larger ones on a logarithmic scale."""
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0)


def agreement_curves(rows: Rows, top_ks: Sequence[int] = (64, 256)) -> Figure:
    """Compound agreement against the number of chunks; a row of panels for each kind of step, a column for each K.

    Args:
        rows: rows of `evals.quality.agreement.compound`.
        top_ks: K of the columns.
    """
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    panels = figure.subplots(len(STEPS), len(top_ks), sharey="row", squeeze=False)
    for (kind, words), line in zip(STEPS.items(), panels, strict=True):
        for top_k, axes in zip(top_ks, line, strict=True):
            here = [row for row in rows if row["queries"] == kind and row["top_k"] == top_k]
            for method, colour in zip(_CHUNK_METHODS, COLOURS, strict=False):
                _curve(axes, [row for row in here if row["method"] == method], "chunks", colour, method)
            for method, style in zip(_STATIC_METHODS, ("--", ":", "-."), strict=True):
                (row,) = (row for row in here if row["method"] == method)
                axes.axhline(row["mean"], color="0.35", linestyle=style, linewidth=1.2, label=method)
            axes.set_title(f"{words}, top {top_k}", fontsize=10)
            axes.set_xlabel("chunks a head ranks with, of 32")
            axes.set_xticks(sorted({row["chunks"] for row in here if row["chunks"]}))
            axes.set_ylim(0, 0.85)
        line[0].set_ylabel("share of the head's own top keys found")
    return _with_legend(figure)


def transfer_curves(rows: Rows, top_k: int = 256) -> Figure:
    """Agreement against the length of the calibration documents; a panel for each kind of step.

    Args:
        rows: rows of `evals.quality.agreement.transfer`.
        top_k: K of the agreement.
    """
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    for (kind, words), axes in zip(STEPS.items(), figure.subplots(1, len(STEPS), sharey=True), strict=True):
        here = [row for row in rows if row["queries"] == kind and row["top_k"] == top_k]
        for planes, colour in zip(dict.fromkeys(row["planes"] for row in here), COLOURS, strict=False):
            for chunks, style in ((4, ":"), (8, "-"), (16, "--")):
                mine = [row for row in here if (row["planes"], row["chunks"]) == (planes, chunks)]
                _curve(axes, mine, "calibration_length", colour, f"{planes}, {chunks} chunks", style)
        _powers(axes, sorted({row["calibration_length"] for row in here}))
        axes.set_title(f"{words}, top {top_k}", fontsize=10)
        axes.set_xlabel("tokens of the calibration documents")
    figure.axes[0].set_ylabel("share of the head's own top keys found")
    return _with_legend(figure, columns=3)


def mass_by_head(rows: Rows, budget: int = 64) -> Figure:
    """Share of attention on the selected keys, head by head; a panel for each kind of step.

    Args:
        rows: rows of `evals.quality.agreement.mass`.
        budget: number of selected tokens.
    """
    figure = Figure(figsize=(9.5, 6.4), layout="constrained")
    for (kind, words), axes in zip(STEPS.items(), figure.subplots(len(STEPS), 1, sharex=True), strict=True):
        here = [row for row in rows if row["queries"] == kind and row["budget"] == budget and row["layer"] is not None]
        methods = ("oracle, each head for itself", "oracle", "FASA", "FASA, 8 recent forced", "sinks + recent")
        labels = ("best keys of the head", "best keys of the group", *methods[2:])
        for number, (method, label) in enumerate(zip(methods, labels, strict=True)):
            mine = [row for row in here if row["method"] == method]
            axes.errorbar(
                [place + 0.15 * (number - 2) for place in range(len(mine))],
                [row["mean"] for row in mine],
                yerr=_errors(mine),
                color=COLOURS[number],
                marker="o",
                markersize=4,
                capsize=2,
                linestyle="none",
                label=label,
            )
        axes.set_xticks(range(len(mine)), [f"{row['layer']}.{row['query_head']}" for row in mine])
        for place in range(1, len(mine)):
            axes.axvline(place - 0.5, color="0.9" if mine[place]["query_head"] else "0.6", linewidth=0.8)
        axes.set_xlim(-0.5, len(mine) - 0.5)
        axes.set_ylim(0, 1.03)
        axes.set_title(f"{words}, {budget} tokens", fontsize=10)
        axes.set_ylabel("share of attention held")
    axes.set_xlabel("layer.query head")
    return _with_legend(figure, columns=5)


def calibration_curves(rows: Rows) -> Figure:
    """Agreement and attention of profiles by the number of samples, and by K; a column for each kind of step.

    Bars are intervals over documents; bands extend from the worst to the best choice of samples.

    Args:
        rows: rows of `evals.quality.calibrations.worth`.
    """
    figure = Figure(figsize=(9.5, 7.0), layout="constrained")
    upper, lower = figure.subplots(2, len(STEPS), sharey="row")
    samples = max(row["samples"] for row in rows if row["calibration_top_k"] != 256)
    for (kind, words), by_samples, by_top_k in zip(STEPS.items(), upper, lower, strict=True):
        here = [row for row in rows if row["queries"] == kind]
        for source, colour in zip(("recall", "text", "mixed"), COLOURS, strict=False):
            mine = [row for row in here if row["calibrated_on"] == source]
            usual = [r for r in mine if r["calibration_top_k"] == 256 and r["figure"] == "agreement on the top 256"]
            _curve(by_samples, usual, "samples", colour, f"calibrated on {source}", band=True)
            several = [r for r in mine if r["samples"] == samples and r["figure"] == "attention held by 64"]
            _curve(by_top_k, several, "calibration_top_k", colour, f"calibrated on {source}", band=True)
        _powers(by_samples, sorted({row["samples"] for row in here}))
        _powers(by_top_k, sorted({row["calibration_top_k"] for row in here}))
        by_samples.set_title(words, fontsize=10)
        by_samples.set_xlabel("calibration samples (K = 256)")
        by_top_k.set_xlabel(f"K of calibration ({samples} samples)")
    upper[0].set_ylabel("agreement on the top 256, 8 chunks")
    lower[0].set_ylabel("attention held by 64 tokens")
    return _with_legend(figure)


def scores_by_budget(rows: Rows) -> Figure:
    """Score against tokens and against bytes read: a row of panels for each task that dense attention can do.

    Args:
        rows: rows of `evals.quality.methods`.
    """
    dense = {row["task"]: row for row in rows if row["budget"] is None and row["score"] > 0}
    figure = Figure(figsize=(9.5, 1.0 + 3.3 * len(dense)), layout="constrained")
    for (task, whole), line in zip(dense.items(), figure.subplots(len(dense), 2, sharey="row"), strict=True):
        here = [row for row in rows if row["task"] == task and row["budget"] is not None]
        _methods(line[0], here, whole, "budget", "tokens a query attends to")
        _methods(line[1], here, whole, "kv_bytes_share", "keys and values read, ranking included")
        line[0].set_ylabel(whole["metric"].replace("_", " ") + (" above dense" if whole["metric"] in POOLED else ""))
    return _with_legend(figure, columns=5)


def scores_by_share(rows: Rows) -> Figure:
    """Increase of perplexity over dense attention after a dense prefill, against the shares of tokens and bytes read.

    Args:
        rows: rows of `evals.quality.methods`, at budgets that are shares.
    """
    (whole,) = (row for row in rows if row["budget"] is None)
    sparse = [row for row in rows if row["budget"] is not None]
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _methods(left, sparse, whole, "budget", "share of the tokens attended to")
    _methods(right, sparse, whole, "kv_bytes_share", "share of keys and values read, ranking included")
    left.set_ylabel("token perplexity above dense")
    return _with_legend(figure, columns=4)


def layer_budgets(rows: Rows) -> Figure:
    """Scores of the spreads of a budget over layers; a panel for each task.

    Args:
        rows: rows of `evals.quality.budgets`.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    ways = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    figure = Figure(figsize=(9.5, 1.6 + 0.3 * len(ways)), layout="constrained")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], strict=True):
        here = [row for row in rows if row["task"] == task]
        for number, budget in enumerate(sorted({row["budget"] for row in here if row["budget"] is not None})):
            mine = sorted((row for row in here if row["budget"] == budget), key=lambda row: ways.index(row["method"]))
            axes.errorbar(
                [row["score"] for row in mine],
                [ways.index(row["method"]) + 0.2 * number - 0.1 for row in mine],
                xerr=_errors(mine, "score"),
                color=COLOURS[number],
                marker="o",
                markersize=4,
                capsize=2,
                linestyle="none",
                label=f"{budget} tokens a layer in the mean",
            )
        (whole,) = (row for row in here if row["budget"] is None)
        axes.axvline(whole["score"], color=_DENSE, linestyle="--", linewidth=1.2, label="dense")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(whole["metric"].replace("_", " "))
    figure.axes[0].set_yticks(range(len(ways)), ways)
    figure.axes[0].invert_yaxis()
    return _with_legend(figure)


def _methods(axes: Axes, rows: Rows, dense: Mapping[str, Any], across: str, words: str) -> None:
    """A line for each method of `_LOOKS`; perplexities are paired differences to dense attention."""
    paired = dense["metric"] in POOLED
    axes.axhline(0 if paired else dense["score"], color=_DENSE, linestyle=":", linewidth=1.5, label="dense")
    for method, (colour, marker, style) in _LOOKS.items():
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["budget"])
        if not mine:
            continue
        points = np.array([difference(r, dense) if paired else (r["score"], r["low"], r["high"]) for r in mine]).T
        axes.errorbar(
            [row[across] for row in mine],
            points[0],
            yerr=np.stack([points[0] - points[1], points[2] - points[0]]).clip(min=0),
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=2.6 if method.startswith("FASA") else 1.2,
            markersize=6 if method.startswith("FASA") else 4,
            markerfacecolor="white" if method in _OPEN else colour,
            elinewidth=0.8,
            alpha=0.9,
            label=method,
            zorder=3 if method.startswith("FASA") else 2,
        )
    if paired:
        axes.set_yscale("symlog", linthresh=_LINEAR)
        axes.yaxis.set_major_formatter("{x:g}")
    places = sorted({row[across] for row in rows})
    if places[-1] > 1:
        _powers(axes, places)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks([tick for tick in _SHARES if 0.8 * places[0] <= tick <= 1.3 * places[-1]])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(words)
    axes.set_title(dense["task"], fontsize=10)


def _powers(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _curve(axes: Axes, rows: Rows, across: str, colour: str, label: str, style: str = "-", band: bool = False) -> None:
    rows = sorted(rows, key=lambda row: row[across])
    places = [row[across] for row in rows]
    means = [row["mean"] for row in rows]
    look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4, "capsize": 2}
    axes.errorbar(places, means, yerr=_errors(rows), label=label, **look)
    if band:
        ends = ([row[end] for row in rows] for end in ("poorest", "best"))
        axes.fill_between(places, *ends, color=colour, alpha=0.15, linewidth=0)


def _errors(rows: Rows, of: str = "mean") -> list[list[float]]:
    return [[max(0, row[of] - row["low"]) for row in rows], [max(0, row["high"] - row[of]) for row in rows]]


def _with_legend(figure: Figure, columns: int = 4) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure
