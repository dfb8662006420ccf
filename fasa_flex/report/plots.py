"""Pictures of profiles (heat maps of chunks) and of scores against budget. Needs matplotlib (extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import Sharing
from fasa_flex.core.criteria import Criterion
from fasa_flex.report.inspection import dominance, is_dominant, measured, overlap, period

_DENSE = "0.35"
_MOST_ROWS = 48
COLOURS = ("#1f6fb4", "#d1603d", "#4a8f53", "#8a5ca8", "#b8860b", "#5f6b7a")
_MARKERS = ("o", "s", "^", "D")  # where there are more methods than colours


def inspection(
    names: Sequence[str],
    profiles: Sequence[FasaProfile],
    n_tip: int,
    per: Sharing = "kv_head",
    criterion: Criterion | None = None,
) -> Figure:
    """Heat maps of profiles, the share of heads in which each chunk is dominant, and the overlap of profiles.

    A heat map has a row for each query head and a column for each chunk, labelled with its period in tokens; dots mark
    dominant chunks. The value is the chunk's agreement with its head, or its share of the sum of the head's variances.
    If there are too many heads for a readable picture, a row is a layer, averaged over its heads, and dots mark the
    chunks that are dominant in at least half of them.

    Args:
        names: names of the profiles.
        profiles: one or more profiles of one shape.
        n_tip: dominant chunks of a head.
        per: as in `FasaProfile.dominant`.
        criterion: as in `FasaProfile.dominant`; None is each profile's default.
    """
    height = 1.3 + _height(profiles[0])
    several = len(profiles) > 1
    side = 1.6 + 0.45 * len(profiles)
    heights = [*(height for _ in profiles), 3.0, *([side] if several else [])]
    figure = Figure(figsize=(_width(profiles[0]), sum(heights) + 0.5), layout="constrained")
    panels = [cell[0] for cell in figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)]
    maps, bars = panels[: len(profiles)], panels[len(profiles)]
    for axes, name, profile in zip(maps, names, profiles, strict=True):
        _draw_chunks(axes, profile, n_tip, per, criterion)
        axes.set_title(name, fontsize=10)
    figure.legend(*maps[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    _draw_dominance(bars, names, profiles, n_tip, per, criterion)
    if several:
        _draw_overlap(panels[-1], names, overlap(profiles, n_tip, per, criterion).mean(-1))
    return figure


def _draw_chunks(axes: Axes, profile: FasaProfile, n_tip: int, per: Sharing, criterion: Criterion | None) -> None:
    layers, heads, _ = profile.agreement.shape
    whole = _by_layer(profile)
    rows = 1 if whole else heads
    table, label = measured(profile, criterion), f"agreement with the full scores (top {profile.provenance.top_k})"
    if profile.criterion(criterion) != "agreement":
        table, label = table / table.sum(-1, keepdim=True).clamp(min=1e-12), "share of the chunks' variances over keys"
    table = table.mean(1) if whole else table.flatten(0, 1)
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=math.ceil(10 * float(table.max())) / 10, aspect="auto")
    if not whole:
        for layer in range(1, layers):
            axes.axhline(layer * heads - 0.5, color="white", linewidth=2)
    shown = range(0, layers, max(1, layers // 40))
    axes.set_yticks([(layer + 0.5) * rows - 0.5 for layer in shown], [f"layer {layer}" for layer in shown])
    axes.tick_params(axis="y", labelsize=8 if whole else None)
    _label_chunks(axes, profile)
    axes.set_ylabel("mean of the layer's query heads" if whole else "query heads")
    axes.figure.colorbar(image, ax=axes, label=label)
    dominant = is_dominant(profile, n_tip, per, criterion)
    if whole:
        dominant = dominant.float().mean(1, keepdim=True) >= 0.5
    step = rows / dominant.shape[1]
    layer_of, head, chunk = dominant.nonzero(as_tuple=True)
    owner = "KV head" if per == "kv_head" else "query head"
    label = f"the {n_tip} dominant chunks of a {owner}"
    axes.scatter(
        chunk,
        layer_of * rows + head * step + (step - 1) / 2,
        s=9,
        color="black",
        label=f"among {label} in at least half of the layer" if whole else label,
    )


def _draw_dominance(
    axes: Axes,
    names: Sequence[str],
    profiles: Sequence[FasaProfile],
    n_tip: int,
    per: Sharing,
    criterion: Criterion | None,
) -> None:
    chunks = profiles[0].agreement.shape[2]
    wide = 0.8 / len(profiles)
    for number, (name, profile) in enumerate(zip(names, profiles, strict=True)):
        places = torch.arange(chunks) + (number - (len(profiles) - 1) / 2) * wide
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, dominance(profile, n_tip, per, criterion), width=wide, color=colour, label=name)
    axes.axhline(n_tip / chunks, color=_DENSE, linestyle="--", linewidth=1, label="chance")
    _label_chunks(axes, profiles[0])
    axes.set_xlim(-0.5, chunks - 0.5)
    axes.set_ylabel("share of heads\nwhere it is dominant")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw_overlap(axes: Axes, names: Sequence[str], shared: Tensor) -> None:
    axes.imshow(shared, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(shared.numpy()):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)])
    axes.set_yticks(range(len(names)), [f"{number}: {name}" for number, name in enumerate(names, 1)])
    axes.set_title("share of dominant chunks in common", fontsize=10)


def _label_chunks(axes: Axes, profile: FasaProfile) -> None:
    chunks = profile.agreement.shape[2]
    ticks = list(range(0, chunks, max(1, chunks // 8)))
    named = profile.layout.frequencies is None
    axes.set_xticks(ticks, [str(chunk) if named else period(profile, chunk) for chunk in ticks])
    axes.set_xlabel("chunk" if named else "chunk, by its period in tokens")


def _by_layer(profile: FasaProfile) -> bool:
    layers, heads, _ = profile.agreement.shape
    return layers * heads > _MOST_ROWS


def _width(profile: FasaProfile) -> float:
    return min(2.5 + 0.22 * profile.agreement.shape[2], 12.0)


def _height(profile: FasaProfile) -> float:
    layers, heads, _ = profile.agreement.shape
    return max(1.6, min(0.2 * layers * (1 if _by_layer(profile) else heads), 9.0))


def score_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Score against budget: a panel for each task, a line for each method, a horizontal line for the dense score.

    Args:
        rows: mappings with ``task``, ``metric``, ``method``, ``budget`` (tokens; None for dense attention), ``score``
            and ``stderr`` (None if unknown).
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    figure = Figure(figsize=(4.2 * len(tasks), 3.7), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [row for row in rows if row["task"] == task]
        for row in here:
            if row["budget"] is None:
                axes.axhline(row["score"], color=_DENSE, linestyle="--", linewidth=1.2, label=row["method"])
        for number, method in enumerate(methods):
            line = sorted((row for row in here if row["method"] == method), key=lambda row: row["budget"])
            axes.errorbar(
                [row["budget"] for row in line],
                [row["score"] for row in line],
                yerr=[row["stderr"] or 0.0 for row in line],
                color=COLOURS[number % len(COLOURS)],
                marker=_MARKERS[number // len(COLOURS) % len(_MARKERS)],
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
    columns = min(6, 3 * len(tasks))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    return figure
