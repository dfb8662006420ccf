"""The tables and pictures of the page about real models, made of its results.

python -m evals.quality.real_page          # writes them between the markers of evals/study_real.md

Of every study NAME in `STUDIES` it takes evals/results/study_real/NAME.json, and where they are there NAME_layers.json
(``--arms layers``), NAME_heads.json and the profile NAME_profile.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evals.marked import fill
from evals.quality.arms import RESULTS, ROOT
from evals.quality.committed import markdown
from evals.quality.real_arms import ALL, DEFAULTS
from evals.quality.real_results import Interval, Results, bytes_of, found, pairs, perplexity

PAGE, FOLDER = ROOT / "evals" / "study_real.md", RESULTS / "study_real"
STUDIES = {
    "smollm2": "SmolLM2-135M-Instruct, novels",
    "smollm2_topics": "SmolLM2-135M-Instruct, Python's language reference",
    "gemma3": "Gemma 3 270M, novels",
}
BUDGETS = (32, 64, 128, 256, 512, 1024)
METHODS = {
    "FASA, default": "fasa {}",
    "FASA, paper": "paper {}",
    "exact scores": "oracle {} completion=none",
    "SparQ": "sparq {} published",
    "SparQ, an eighth of the dimensions": "sparq {} n_tip=0.125 published",
    "SparQ, an eighth, FASA's forced tokens": "sparq {} n_tip=0.125 completion=mean",
    "random sample beside FASA's best": "vattention {}",
    "the same, a quarter sampled": "vattention {} sample=0.25",
    "random sample beside the exact best": "vattention_oracle {}",
    "Double Sparsity": "double_sparsity {} published",
    "Quest": "quest {} published",
    "random chunks": "random_chunks {} published",
    "StreamingLLM": "streaming_llm {} published",
    "SnapKV": "snapkv {} published",
    "R-KV": "rkv {} published",
    "H2O": "h2o {} published",
}
RANKINGS = {
    "exact scores": "oracle",
    "FASA's chunks, default": "fasa",
    "the paper's chunks": "paper",
    "SparQ's dimensions": "sparq",
    "Double Sparsity's channels": "double_sparsity",
    "random chunks": "random_chunks",
}


def arm_of(results: Results, form: str, budget: int) -> str | None:
    """A method's arm at a budget, if it was measured; at 64 tokens a random sample has fewer forced tokens."""
    name = form.format(budget)
    return next((known for known in (name, f"{name} n_recent=8") if known in results["arms"]), None)


def window_length(results: Results) -> int:
    """Tokens of the windows that most arms were measured on: 8192, or the longest."""
    lengths = {int(name.split("/")[0]) for name in results["windows"]}
    return 8192 if 8192 in lengths else max(lengths)


def shown(made: Interval | None, digits: int = 3, signed: bool = False) -> str:
    """With its interval."""
    if made is None:
        return ""
    mark = "+" if signed else ""
    return f"{made.mean:{mark}.{digits}f} [{made.low:{mark}.{digits}f}, {made.high:{mark}.{digits}f}]"


def tokens(results: Results) -> str:
    """Perplexity over dense attention's at the same tokens."""
    length = window_length(results)
    lines = []
    for label, form in METHODS.items():
        arms = [arm_of(results, form, budget) for budget in BUDGETS]
        if any(arms):
            lines.append([label, *("" if arm is None else shown(perplexity(results, arm, length)) for arm in arms)])
    return markdown([f"of {length} tokens", *map(str, BUDGETS)], lines)


def equal_bytes(results: Results) -> str:
    """The best arm of each method that reads no more than the default, and what it loses to it."""
    length = window_length(results)
    lines = []
    for default in DEFAULTS:
        allowed, own = bytes_of(results, default, length), perplexity(results, default, length)
        if allowed is None or own is None:
            continue
        lines.append([f"**{default}**", f"{allowed:.1%}", shown(own), "", "", ""])
        for label, form in METHODS.items():
            arms = [arm for budget in BUDGETS if (arm := arm_of(results, form, budget)) is not None and arm != default]
            affordable = [arm for arm in arms if (bytes_of(results, arm, length) or 2.0) <= 1.05 * allowed]
            ratios = {arm: ratio for arm in affordable if (ratio := perplexity(results, arm, length)) is not None}
            if not ratios or label == "FASA, default":
                continue
            best = min(ratios, key=lambda arm: ratios[arm].mean)
            lines.append(
                [
                    f"{label} ({best.split()[1]})",
                    f"{bytes_of(results, best, length):.1%}",
                    shown(ratios[best]),
                    shown(perplexity(results, best, length, default)),
                    shown(found(results, best, None, default), 2, signed=True),
                    str(len(pairs(results, "windows", best, default, length))),
                ]
            )
    head = ["at most 5 % more bytes", "bytes", "perplexity over dense", "over the default's", "needles", "windows"]
    return markdown(head, lines)


def needles(results: Results) -> str:
    """Needles found of the prompts of each length, and over all lengths the share more than dense attention finds."""
    lengths = sorted({int(name.split("/")[0]) for name in results["needles"]})
    lines = []
    for arm in results["arms"]:
        cells = []
        for length in lengths:
            hits = [own for own, _ in pairs(results, "needles", arm, arm, length)]
            cells.append(f"{sum(hits):.0f} of {len(hits)}" if hits else "")
        if any(cells):
            lines.append([f"**{arm}**" if arm in DEFAULTS else arm, *cells, shown(found(results, arm), 2, signed=True)])
    return markdown(["", *(f"{length} tokens" for length in lengths), "more than dense"], lines)


def completions(results: Results) -> str:
    """Every completion on every ranking that estimates logits, at 128 tokens."""
    length = window_length(results)
    lines = []
    for label, method in RANKINGS.items():
        names = [f"{method} 128 completion={kind}" for kind in ("none", "mean", "first_order")]
        names[0] = "paper 128" if method == "paper" else names[0]
        names[2] = "fasa 128" if method == "fasa" else names[2]
        cells = [shown(perplexity(results, name, length)) if name in results["arms"] else "" for name in names]
        if any(cells):
            lines.append([label, *cells])
    return markdown(["ranking", "no completion", "mean value", "first order"], lines)


def lengths(results: Results) -> str:
    """Perplexity over dense attention's by context."""
    known = sorted({int(name.split("/")[0]) for name in results["windows"]})
    arms = [arm for arm in ALL if arm in results["arms"]]
    lines = [[arm, *(shown(perplexity(results, arm, length)) for length in known)] for arm in arms]
    return markdown(["tokens of context", *map(str, known)], lines)


def layers(results: Results) -> str:
    """The layers that cost most when they alone are sparse, each with its perplexity over dense attention's."""
    by_arm: dict[str, dict[int, float]] = {}
    for name in results["arms"]:
        arm, _, layer = name.partition(" only=")
        ratio = perplexity(results, name) if layer else None
        if ratio:
            by_arm.setdefault(arm, {})[int(layer)] = ratio.mean
    lines = []
    for arm, by_layer in by_arm.items():
        worst = sorted(by_layer, key=lambda layer: -by_layer[layer])[:6]
        product = math.exp(sum(math.log(ratio) for ratio in by_layer.values()))
        lines.append([arm, ", ".join(f"{layer}: {by_layer[layer]:.4f}" for layer in worst), f"{product:.3f}"])
    return markdown(["arm", "layers of most loss", "product over all layers"], lines)


def heads(results: Results) -> str:
    """The query heads whose output is furthest from dense attention's."""
    lines = []
    for arm, by_layer in results["errors"].items():
        flat = [(error, layer, head) for layer, held in by_layer.items() for head, error in enumerate(held)]
        flat.sort(reverse=True)
        mean = sum(error for error, _, _ in flat) / len(flat)
        worst = ", ".join(f"{layer}.{head}: {error:.2f}" for error, layer, head in flat[:8])
        lines.append([arm, f"{mean:.3f}", f"{flat[len(flat) // 2][0]:.3f}", worst])
    return markdown(["arm", "mean error", "median", "layer.head of most error"], lines)


def read(name: str) -> Results | None:
    """The results of a study; None where there are none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def made_of(name: str, make: Callable[[Results], str]) -> str:
    """A table of a study's file, or that it was not measured."""
    results = read(name)
    return "*Not measured yet.*" if results is None else make(results)


_TABLES = {"tokens": tokens, "bytes": equal_bytes, "needles": needles, "completion": completions, "lengths": lengths}
TABLES: dict[str, Callable[[], str]] = {
    f"{study} {name}": functools.partial(made_of, study, make) for study in STUDIES for name, make in _TABLES.items()
}
TABLES |= {f"{study} layers": functools.partial(made_of, f"{study}_layers", layers) for study in ("smollm2", "gemma3")}
TABLES |= {f"{study} heads": functools.partial(made_of, f"{study}_heads", heads) for study in ("smollm2", "gemma3")}


def draw_bytes(results: Sequence[Results], titles: Sequence[str], most: float = 1.3) -> Any:
    """Perplexity over dense against the share of bytes read, a panel for each study, a line for each method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, PercentFormatter

    from fasa_flex.plots import COLOURS

    figure = Figure(figsize=(6.4 * len(results), 4.6), layout="constrained")
    for axes, own, title in zip(figure.subplots(1, len(results), squeeze=False)[0], results, titles, strict=True):
        length = window_length(own)
        for number, (label, form) in enumerate(METHODS.items()):
            points = []
            for budget in BUDGETS:
                arm = arm_of(own, form, budget)
                share = None if arm is None else bytes_of(own, arm, length)
                ratio = None if arm is None else perplexity(own, arm, length)
                if share is not None and ratio is not None and share < 1:
                    points.append((share, *ratio[:3]))
            if not points:
                continue
            shares, means, lows, highs = zip(*sorted(points), strict=True)
            bars = [
                [m - low for m, low in zip(means, lows, strict=True)],
                [h - m for m, h in zip(means, highs, strict=True)],
            ]
            looks = {"color": COLOURS[number % len(COLOURS)], "marker": "os^Dvx"[number // len(COLOURS)]}
            bold = {"linewidth": 2.4, "zorder": 5} if number == 0 else {"linewidth": 1.0}
            axes.errorbar(
                shares, means, yerr=bars, markersize=4, capsize=2, elinewidth=0.6, label=label, **looks, **bold
            )
        axes.axhline(1.0, color="0.35", linestyle="--", linewidth=1.0, label="dense")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0.98, most)
        axes.set_xlabel(f"bytes read of a dense step's, {length} tokens, 16-bit cache")
        axes.set_ylabel("perplexity over dense attention's")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def draw_criteria(profile: Any, title: str) -> Any:
    """What each criterion goes by, a row for each layer (the mean of its heads), with the chunks it mostly keeps."""
    from matplotlib.figure import Figure

    from fasa_flex.inspection import choosing, default_n_tip, is_dominant, measured, period

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


def draw(folder: Path = FOLDER) -> list[Path]:
    """The pictures of what is there."""
    from fasa_flex import FasaProfile

    drawn = []
    known = {name: made for name in STUDIES if (made := read(name)) is not None}
    if known:
        figure = draw_bytes(list(known.values()), [STUDIES[name] for name in known])
        drawn.append(folder / "bytes.png")
        figure.savefig(drawn[-1], dpi=110)
    for name, title in STUDIES.items():
        profile = folder / f"{name}_profile"
        if profile.exists():
            drawn.append(folder / f"{name}_criteria.png")
            draw_criteria(FasaProfile.from_pretrained(profile), title).savefig(drawn[-1], dpi=110)
    return drawn


if __name__ == "__main__":
    fill(PAGE, TABLES)
    for path in draw():
        print(path)
