"""Pictures from saved results: what the heads agree on, and what a budget costs. Needs matplotlib (``plots`` extra)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fasa_flex.profile import FasaProfile

_DENSE = "0.35"
_COLOURS = ("#1f6fb4", "#d1603d", "#4a8f53", "#8a5ca8", "#b8860b", "#5f6b7a")


def agreement_heatmap(profile: FasaProfile, n_tip: int | None = None) -> Figure:
    """Contextual agreement of every chunk with its head: a row for each query head, a column for each chunk.

    The columns are labelled with the chunk's period, the distance in tokens over which it turns once.

    Args:
        profile: The table.
        n_tip: Mark the dominant chunks of each key/value head with dots.
    """
    layers, heads, chunks = profile.agreement.shape
    figure = Figure(figsize=(2.5 + 0.22 * chunks, 1.6 + 0.2 * layers * heads), layout="constrained")
    axes = figure.add_subplot()
    table = profile.agreement.flatten(0, 1)
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=math.ceil(10 * float(table.max())) / 10, aspect="auto")
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=2)
    axes.set_yticks([(layer + 0.5) * heads - 0.5 for layer in range(layers)], [f"layer {i}" for i in range(layers)])
    ticks = list(range(0, chunks, max(1, chunks // 8)))
    axes.set_xticks(ticks, [_period(profile, chunk) for chunk in ticks])
    axes.set_xlabel("chunk, by its period in tokens")
    axes.set_ylabel("query heads")
    figure.colorbar(image, ax=axes, label=f"agreement with the full scores (top {profile.provenance.top_k})")
    if n_tip is not None:
        group = heads // profile.provenance.kv_heads
        dots = [
            (chunk, layer * heads + kv_head * group + (group - 1) / 2)
            for layer, kv_heads in enumerate(profile.dominant(n_tip).tolist())
            for kv_head, kept in enumerate(kv_heads)
            for chunk in kept
        ]
        axes.scatter(*zip(*dots, strict=True), s=9, color="black", label=f"the {n_tip} dominant chunks of a KV head")
        figure.legend(loc="outside lower center", frameon=False)
    return figure


def score_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Score against budget, a panel for each task, a line for each method, and the dense score across.

    Args:
        rows: Each with ``task``, ``metric``, ``method``, ``budget`` (tokens, None for dense attention), ``score`` and
            ``stderr`` (None where unknown).
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    figure = Figure(figsize=(4.2 * len(tasks), 3.7), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [row for row in rows if row["task"] == task]
        for row in here:
            if row["budget"] is None:
                axes.axhline(row["score"], color=_DENSE, linestyle="--", linewidth=1.2, label=row["method"])
        for method, colour in zip(methods, _COLOURS, strict=False):
            line = sorted((row for row in here if row["method"] == method), key=lambda row: row["budget"])
            axes.errorbar(
                [row["budget"] for row in line],
                [row["score"] for row in line],
                yerr=[row["stderr"] or 0.0 for row in line],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=method,
            )
        budgets = sorted({row["budget"] for row in here if row["budget"] is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("budget, tokens a query attends to")
        axes.set_ylabel(here[0]["metric"].replace("_", " "))
        axes.set_title(task, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _period(profile: FasaProfile, chunk: int) -> str:
    frequencies = profile.layout.frequencies
    if frequencies is None:
        return str(chunk)
    if chunk >= len(frequencies):
        return "∞"
    period = 2 * math.pi / abs(float(frequencies[chunk]))
    power = min(int(math.log10(period)) // 3, 3)
    short = period / 1000**power
    return f"{short:.{int(power > 0 and short < 10)}f}{('', 'k', 'M', 'G')[power]}"
