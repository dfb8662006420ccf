"""The demo's rows as one table and one picture."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from evals.quality.committed import markdown, mean_error
from fasa_flex.report.plots import COLOURS

NEEDLES, TEXT = "topics_needles", "topics_text"
Row = dict[str, Any]


def summary(rows: list[Row]) -> list[Row]:
    """One row for each arm with both tasks, and perplexity relative to dense attention, paired by text."""
    dense = next(row for row in rows if row["method"] == "dense" and row["task"] == TEXT)
    lines = []
    for needles, text in zip(*([row for row in rows if row["task"] == task] for task in (NEEDLES, TEXT)), strict=True):
        above, error = mean_error(own - other for own, other in zip(text["texts"], dense["texts"], strict=True))
        lines.append(
            {
                "name": needles["method"] + (f", {needles['budget']} tokens" if needles["budget"] else ""),
                "found": mean_error(needles["texts"]),
                "questions": needles["documents"],
                "perplexity": math.exp(fmean(text["texts"])),
                "over_dense": (math.exp(above), math.exp(above) * error),
                "attended": text["attended"],
                "read": text["read"],
            }
        )
    return lines


def table(rows: list[Row]) -> str:
    """A Markdown table with a line for each arm."""
    lines = summary(rows)
    head = ["attention", f"needles found, of {lines[0]['questions']}", "perplexity", "over dense"]
    return markdown(
        [*head, "keys attended", "bytes read"],
        [
            [
                line["name"],
                f"{line['found'][0] * line['questions']:.0f} ± {line['found'][1] * line['questions']:.0f}",
                f"{line['perplexity']:.2f}",
                "1" if line["name"] == "dense" else "{:.3f} ± {:.3f}".format(*line["over_dense"]),
                f"{line['attended']:.1%}",
                f"{line['read']:.1%}",
            ]
            for line in lines
        ],
    )


def picture(rows: list[Row]) -> Figure:
    """Needles and perplexity against the bytes that sparse queries read."""
    dense, *sparse = summary(rows)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "found", "share of needles found"), (right, "over_dense", "perplexity over dense")):
        axes.axhline(dense[key][0], color="0.35", linestyle="--", linewidth=1.2, label="dense, 100 % of the bytes")
        for line, colour in zip(sparse, COLOURS, strict=False):
            axes.errorbar(
                100 * line["read"], line[key][0], line[key][1], fmt="o", color=colour, capsize=2, label=line["name"]
            )
        axes.set_xlabel("keys and values read by a sparse query, % of the bytes")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
