"""The tables and pictures of evals/study_real.md, from the results of real models.

python -m evals.quality.real_page          # writes them between the markers of evals/study_real.md

For every study NAME in `STUDIES` it reads evals/results/study_real/NAME.json and, if they exist, NAME_lengths.json
(several ``--length``), NAME_layers.json (``--arms layers``), NAME_heads.json and the profile NAME_profile. Rows,
columns, sections and lines of a picture without measurements are left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.marked import fill
from evals.quality.arms import RESULTS, ROOT
from evals.quality.committed import markdown
from evals.quality.real_arms import ALL, DEFAULTS
from evals.quality.real_criteria import criteria
from evals.quality.real_pictures import Point, draw_bytes, draw_criteria
from evals.quality.real_results import Interval, Results, bytes_of, found, pairs, perplexity
from fasa_flex import FasaProfile

PAGE, FOLDER = ROOT / "evals" / "study_real.md", RESULTS / "study_real"
STUDIES = {
    "smollm2": "SmolLM2-135M-Instruct on novels",
    "smollm2_topics": "SmolLM2-135M-Instruct on Python's language reference",
    "gemma3": "Gemma 3 270M on novels",
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
    """The measured arm of a method at a budget; at 64 tokens a random sample has fewer forced tokens."""
    name = form.format(budget)
    return next((known for known in (name, f"{name} n_recent=8") if known in results["arms"]), None)


def window_length(results: Results) -> int:
    """Length of the windows with most arms: 8192 tokens, or the longest."""
    lengths = {int(name.split("/")[0]) for name in results["windows"]}
    return 8192 if 8192 in lengths else max(lengths)


def shown(interval: Interval | None, digits: int = 3, signed: bool = False) -> str:
    """A value with its interval."""
    if interval is None:
        return ""
    mark = "+" if signed else ""
    return f"{interval.mean:{mark}.{digits}f} [{interval.low:{mark}.{digits}f}, {interval.high:{mark}.{digits}f}]"


def label_of(arm: str) -> str:
    """The label of an arm: that of `METHODS`, the default's in bold, or its name."""
    labels = {form.format(budget): f"{label}, {budget} tokens" for label, form in METHODS.items() for budget in BUDGETS}
    label = labels.get(arm, arm)
    return f"**{label}**" if arm in DEFAULTS else label


def filled(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of the rows and columns with a measurement; empty if there are none."""
    lines = [line for line in lines if any(line[1:])]
    kept = [column for column in range(len(head)) if column == 0 or any(line[column] for line in lines)]
    cells = [[line[column] for column in kept] for line in lines]
    return markdown([head[column] for column in kept], cells) if cells else ""


def tokens(results: Results) -> str:
    """Perplexity relative to dense attention, at equal tokens."""
    length = window_length(results)
    lines = []
    for label, form in METHODS.items():
        arms = [arm_of(results, form, budget) for budget in BUDGETS]
        lines.append([label, *("" if arm is None else shown(perplexity(results, arm, length)) for arm in arms)])
    return filled([f"of {length} tokens", *map(str, BUDGETS)], lines)


def equal_bytes(results: Results) -> str:
    """Each method's best arm that reads at most as many bytes as the default, and its loss to the default."""
    length = window_length(results)
    lines = []
    for default in DEFAULTS:
        allowed, own = bytes_of(results, default, length), perplexity(results, default, length)
        if allowed is None or own is None:
            continue
        rivals = []
        for label, form in METHODS.items():
            arms = [arm for budget in BUDGETS if (arm := arm_of(results, form, budget)) is not None and arm != default]
            affordable = [arm for arm in arms if (bytes_of(results, arm, length) or 2.0) <= 1.05 * allowed]
            ratios = {arm: ratio for arm in affordable if (ratio := perplexity(results, arm, length)) is not None}
            if not ratios or label == "FASA, default":
                continue
            best = min(ratios, key=lambda arm: ratios[arm].mean)
            rivals.append(
                [
                    label_of(best),
                    f"{bytes_of(results, best, length):.1%}",
                    shown(ratios[best]),
                    shown(perplexity(results, best, length, default)),
                    shown(found(results, best, None, default), 2, signed=True),
                    str(len(pairs(results, "windows", best, default, length))),
                ]
            )
        if rivals:
            lines += [[label_of(default), f"{allowed:.1%}", shown(own), "", "", ""], *rivals]
    head = ["at most 5 % more bytes", "bytes", "perplexity over dense", "over the default's", "needles", "windows"]
    return filled(head, lines)


def has_few_prompts(results: Results, arm: str) -> bool:
    """Whether an arm lacks more than a quarter of the prompts, as those of two of four lengths do."""
    return 4 * len(pairs(results, "needles", arm, "dense")) < 3 * len(results["needles"])


def needles(results: Results) -> str:
    """Needles found by length, and over all lengths the difference of shares to dense attention.

    Arms with few prompts are in `needles_at_tokens` only.
    """
    lengths = sorted({int(name.split("/")[0]) for name in results["needles"]})
    lines = []
    for arm in (arm for arm in results["arms"] if not has_few_prompts(results, arm)):
        cells = []
        for length in lengths:
            hits = [own for own, _ in pairs(results, "needles", arm, arm, length)]
            cells.append(f"{sum(hits):.0f} of {len(hits)}" if hits else "")
        more = "" if arm == "dense" else shown(found(results, arm), 2, signed=True)
        lines.append([label_of(arm), *cells, more])
    return filled(["", *(f"{length} tokens" for length in lengths), "more than dense"], lines)


def needles_at_tokens(results: Results) -> str:
    """Difference to dense attention's share of found needles, at equal tokens; empty if `needles` has every arm."""
    lines, few = [], False
    for label, form in METHODS.items():
        arms = [arm_of(results, form, budget) for budget in BUDGETS]
        lines.append([label, *("" if arm is None else shown(found(results, arm), 2, signed=True) for arm in arms)])
        few = few or any(has_few_prompts(results, arm) for arm in arms if arm is not None)
    return filled(["more than dense", *map(str, BUDGETS)], lines) if few else ""


def completions(results: Results) -> str:
    """Every completion with every ranking that estimates logits, at 128 tokens; empty if there is only one."""
    length = window_length(results)
    lines = []
    for label, method in RANKINGS.items():
        names = [f"{method} 128 completion={kind}" for kind in ("none", "mean", "first_order")]
        names[0] = "paper 128" if method == "paper" else names[0]
        names[2] = "fasa 128" if method == "fasa" else names[2]
        cells = [shown(perplexity(results, name, length)) if name in results["arms"] else "" for name in names]
        lines.append([label, *cells])
    measured = sum(map(bool, itertools.chain(*(cells for _, *cells in lines))))
    return filled(["ranking", "no completion", "mean value", "first order"], lines) if measured > 1 else ""


def lengths(results: Results) -> str:
    """Perplexity relative to dense attention by context; empty if there is only one context."""
    known = sorted({int(name.split("/")[0]) for name in results["windows"]})
    arms = [arm for arm in ALL if arm in results["arms"]]
    lines = [[label_of(arm), *(shown(perplexity(results, arm, length)) for length in known)] for arm in arms]
    return filled(["tokens of context", *map(str, known)], lines) if len(known) > 1 else ""


def layers(results: Results) -> str:
    """The layers with the largest perplexity relative to dense attention when only they are sparse."""
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
        lines.append([label_of(arm), ", ".join(f"{layer}: {by_layer[layer]:.4f}" for layer in worst), f"{product:.3f}"])
    return filled(["", "layers of most loss", "product over all layers"], lines)


def heads(results: Results) -> str:
    """The query heads with the largest errors."""
    lines = []
    for arm, by_layer in results["errors"].items():
        flat = [(error, layer, head) for layer, held in by_layer.items() for head, error in enumerate(held)]
        flat.sort(reverse=True)
        mean = sum(error for error, _, _ in flat) / len(flat)
        worst = ", ".join(f"{layer}.{head}: {error:.2f}" for error, layer, head in flat[:8])
        lines.append([label_of(arm), f"{mean:.3f}", f"{flat[len(flat) // 2][0]:.3f}", worst])
    return filled(["", "mean error", "median", "layer.head of most error"], lines)


def read(name: str) -> Results | None:
    """The results of a study; None if there are none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "At the same tokens": ("", tokens),
    "At the same bytes": ("", equal_bytes),
    "Needles": ("", needles),
    "Needles at the same tokens": ("", needles_at_tokens),
    "Completion on every ranking, 128 tokens": ("", completions),
    "Length of the context": ("_lengths", lengths),
    "Needles in longer contexts": ("_lengths", needles),
    "One sparse layer at a time": ("_layers", layers),
    "Heads": ("_heads", heads),
}
"""Sections: heading, suffix of the result file, and function of the table."""


def profile_of(study: str) -> FasaProfile | None:
    """The profile of a study; None if there is none."""
    folder = FOLDER / f"{study}_profile"
    return FasaProfile.from_pretrained(folder) if folder.exists() else None


def table(study: str, heading: str) -> str:
    """A section's table; empty if nothing was measured."""
    end, make = SECTIONS[heading]
    results = read(study + end)
    return "" if results is None else make(results)


def sections(study: str) -> str:
    """A study's headings and tables; empty if nothing was measured."""
    parts = [f"### {heading}\n\n{text}" for heading in SECTIONS if (text := table(study, heading))]
    profile = profile_of(study)
    if profile is not None and parts:
        parts.append(f"### Chunks by agreement and by variance\n\n{criteria(profile)}")
    return "\n\n".join([f"## {STUDIES[study]}", *parts]) if parts else ""


TABLES: dict[str, Callable[[], str]] = {study: functools.partial(sections, study) for study in STUDIES}


def points(results: Results) -> dict[str, list[Point]]:
    """Share of bytes and relative perplexity of every method, at each measured budget."""
    length = window_length(results)
    by_method: dict[str, list[Point]] = {}
    for label, form in METHODS.items():
        for arm in (arm_of(results, form, budget) for budget in BUDGETS):
            share = None if arm is None else bytes_of(results, arm, length)
            ratio = None if arm is None else perplexity(results, arm, length)
            if share is not None and ratio is not None and share < 1:
                by_method.setdefault(label, []).append(Point(share, *ratio[:3]))
    return by_method


def draw(folder: Path = FOLDER) -> list[Path]:
    """Draw the pictures of all results that exist; returns their files."""
    drawn = []
    known = {name: results for name in STUDIES if (results := read(name)) is not None}
    if known:
        panels = {STUDIES[name]: (window_length(results), points(results)) for name, results in known.items()}
        figure = draw_bytes(panels, list(METHODS))
        drawn.append(folder / "bytes.png")
        figure.savefig(drawn[-1], dpi=110)
    for name, title in STUDIES.items():
        profile = profile_of(name)
        if profile is not None:
            drawn.append(folder / f"{name}_criteria.png")
            draw_criteria(profile, title).savefig(drawn[-1], dpi=110)
    return drawn


if __name__ == "__main__":
    fill(PAGE, TABLES)
    for path in draw():
        print(path)
