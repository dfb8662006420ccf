"""The pictures of evals/study_real.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Point(NamedTuple):
    """An arm's bytes as a share of a dense step's, and its perplexity relative to dense with its interval."""

    share: float
    mean: float
    low: float
    high: float


def draw_bytes(
    panels: Mapping[str, tuple[int, Mapping[str, Sequence[Point]]]], methods: Sequence[str], most: float = 1.3
) -> Any:
    """Relative perplexity against the share of bytes read: a panel for each study, a line for each method.

    Args:
        panels: for each title, the tokens of the context and the points by method.
        methods: all methods, so that a method's colour does not depend on the measured ones.
        most: upper limit of the perplexity axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    from fasa_flex.report.plots import COLOURS

    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    legend: dict[str, Any] = {}
    for axes, (title, (length, points)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label in (label for label in methods if label in points):
            number, line = methods.index(label), sorted(points[label])
            bars = [[point.mean - point.low for point in line], [point.high - point.mean for point in line]]
            looks = {"color": COLOURS[number % len(COLOURS)], "marker": "os^Dvx"[number // len(COLOURS)]}
            bold = {"linewidth": 2.4, "zorder": 5} if number == 0 else {"linewidth": 1.0}
            shares, means = [point.share for point in line], [point.mean for point in line]
            legend[label] = axes.errorbar(
                shares, means, yerr=bars, markersize=4, capsize=2, elinewidth=0.6, label=label, **looks, **bold
            )
        legend["dense"] = axes.axhline(1.0, color="0.35", linestyle="--", linewidth=1.0, label="dense")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0.98, most)
        axes.set_xlabel(f"bytes read of a dense step's, {length} tokens, 16-bit cache")
        axes.set_ylabel("perplexity over dense attention's")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    order = [label for label in (*methods, "dense") if label in legend]
    figure.legend(
        [legend[label] for label in order], order, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def draw_criteria(profile: Any, title: str) -> Any:
    """Heat maps of each criterion's table, a row for each layer (the mean of its heads), dominant chunks marked."""
    from matplotlib.figure import Figure

    from fasa_flex.report.inspection import choosing, default_n_tip, is_dominant, measured, period

    criteria, n_tip = choosing(profile), default_n_tip(profile)
    figure = Figure(figsize=(4.6 * len(criteria), 1.6 + 0.17 * profile.agreement.shape[0]), layout="constrained")
    for axes, criterion in zip(figure.subplots(1, len(criteria), squeeze=False)[0], criteria, strict=True):
        table = measured(profile, criterion)
        if criterion != "agreement":
            table = table / table.sum(-1, keepdim=True).clamp(min=1e-12)
        image = axes.imshow(table.mean(1), cmap="Blues", aspect="auto", vmin=0)
        kept = is_dominant(profile, n_tip, criterion=criterion).float().mean(1) >= 0.5
        layer, chunk = kept.nonzero(as_tuple=True)
        axes.scatter(chunk, layer, s=4, color="black")
        ticks = list(range(0, table.shape[-1], max(1, table.shape[-1] // 8)))
        axes.set_xticks(ticks, [period(profile, tick) for tick in ticks], fontsize=7)
        axes.set_xlabel("chunk, by its period in tokens")
        axes.set_ylabel("layer")
        axes.set_title(criterion.replace("_", " "), fontsize=10)
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{title}: dots are among the {n_tip} chunks of at least half of a layer's heads", fontsize=10)
    return figure
