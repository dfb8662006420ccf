"""A benchmark's rows as Markdown tables, as sentences on crossovers, and as a picture (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fasa_flex.bench.limits import Crossover, crossover

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A table of every rival of every row, with its speed-up over the marked best dense rival."""
    if not rows:
        return "no rows"
    whole_step = "layers" in rows[0]
    header = ["shape", "batch", "context", "attention", "ms (quartiles)", "GB/s", "times best dense"]
    if whole_step:
        header += ["ceiling", "tok/s", "tok/s, all layers (projected)"]
    else:
        header += [f"{rows[0].get('limit_kind', 'byte')} limit", "share of the limit"]
    lines = [[*header, "memory, MB"], ["---"] * 4 + ["--:"] * (len(header) - 3)]
    for row in sorted(rows, key=lambda row: (row["shape"], row["batch"], row["context"])):
        for rival in sorted(row["rivals"], key=lambda rival: (rival["kind"], rival["seconds"])):
            own = _step(row, rival) if whole_step else _op(row, rival)
            lines.append([*_shared(row, rival), *own, f"{rival['memory']['peak'] / 1e6:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """A short table: time of the best dense rival, speed-up of each sparse rival, and the largest possible speed-up."""
    graphs = [{**row, "rivals": [r for r in row["rivals"] if not r["timed"].startswith("calls (")]} for row in rows]
    names = _names(graphs, "sparse")  # without rivals timed outside of a CUDA graph
    bound, word = ("ceiling", "Amdahl ceiling") if rows and "ceiling" in rows[0] else ("limit", "byte-count limit")
    header = ["batch", "context", "best dense", *names, word]
    lines = [header, ["--:", "--:", "---", *("--:" for _ in names), "--:"]]
    for row in sorted(rows, key=lambda row: (row["batch"], row["context"])):
        rivals = {rival["name"]: rival for rival in row["rivals"]}
        best = rivals[row["best_dense"]]
        found = [f"{rivals[name]['speedup']:.2f}x" if name in rivals else "-" for name in names]
        dense = f"{1e3 * best['seconds']:.3g} ms, {row['best_dense']}"
        most = f"{row[bound]:.{2 if bound == 'ceiling' else 1}f}x"
        lines.append([str(row["batch"]), _short(row["context"]), dense, *found, most])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def side_by_side(runs: Mapping[str, Sequence[Row]], name: str) -> str:
    """A table of one rival under several settings: speed-up over the best dense rival, and its share of the byte limit.

    Args:
        runs: rows of the op part, by a name of their settings.
        name: name of the rival.
    """
    header = ["batch", "context", *runs]
    lines = [header, ["--:"] * len(header)]
    found = {}
    for run, rows in runs.items():
        for row in rows:
            for rival in (rival for rival in row["rivals"] if rival["name"] == name):
                share = f"{rival['limit_share']:.0%} of {row['limit']:.1f}x"
                found[row["batch"], row["context"], run] = f"{rival['speedup']:.2f}x ({share})"
    for batch, context in sorted({key[:2] for key in found}):
        lines.append([str(batch), _short(context), *(found.get((batch, context, run), "-") for run in runs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shared(row: Row, rival: Row) -> list[str]:
    name = rival["name"] + (" (best dense)" if rival["name"] == row["best_dense"] else "")
    if rival["timed"].startswith("calls ("):  # on CUDA, where the other rivals are graphs
        name += ", launch by launch"
    shape = row["shape"]
    if "layers" in row and row["layers"] != row["full_layers"]:
        shape += f", {row['layers']} of {row['full_layers']} layers"
    first, third = (1e3 * value for value in rival["quartiles"])
    times = f"{1e3 * rival['seconds']:.3g} ({first:.3g}-{third:.3g})"
    speed = f"{rival['speedup']:.2f}"
    return [shape, str(row["batch"]), str(row["context"]), name, times, f"{rival['gb_per_s']:.1f}", speed]


def _op(row: Row, rival: Row) -> list[str]:
    if rival["kind"] == "dense":
        return ["-", "-"]
    return [f"{rival.get('limit', row['limit']):.2f}", f"{rival['limit_share']:.0%}"]


def _step(row: Row, rival: Row) -> list[str]:
    ceiling = f"{row['ceiling']:.2f}" if rival["kind"] == "sparse" else "-"
    projected = rival["projected"]
    return [ceiling, f"{rival['tokens_per_s']:.1f}", f"{projected['tokens_per_s']:.1f}" if projected else "-"]


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The crossover of each sparse rival with the best dense one, for every shape and batch."""
    found = []
    for shape, batch in _panels(rows):
        for name in _names(rows, "sparse"):
            points = [(row["context"], rival["speedup"]) for row, rival in _line(rows, shape, batch, name)]
            if points:
                at: Crossover = crossover(points)
                found.append({"shape": shape, "batch": batch, "name": name, "context": at.context, "how": at.how})
    return found


def sentences(found: Iterable[Row]) -> str:
    """Crossovers as sentences."""
    return "\n".join(
        f"{c['shape']}, batch {c['batch']}: {c['name']} beats the best dense attention "
        + (f"from {c['context']} tokens on ({c['how']})" if c["context"] else f"at a context {c['how']}")
        for c in found
    )


def absences(rows: Sequence[Row]) -> str:
    """Rivals that rows lack or that were timed outside of a graph, with reasons and contexts."""
    found: dict[str, list[int]] = {}
    for row in rows:
        launched = {r["name"]: r["timed"] for r in row["rivals"] if r["timed"].startswith("calls (")}
        for name, reason in (*row["left_out"].items(), *row.get("notes", {}).items(), *launched.items()):
            found.setdefault(f"{name}: {reason}", []).append(row["context"])
    return "\n".join(f"{what} (at {', '.join(map(str, dict.fromkeys(at)))} tokens)" for what, at in found.items())


def picture(rows: Sequence[Row], title: str) -> Any:
    """A figure with a column for each shape and batch: speed-ups over the best dense rival above, times below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = sorted(_panels(rows))
    figure = Figure(figsize=(1.0 + 4.2 * len(panels), 7.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    colours = {name: f"C{index}" for index, name in enumerate(_names(rows, "sparse"))}
    for column, (shape, batch) in enumerate(panels):
        here = sorted((r for r in rows if (r["shape"], r["batch"]) == (shape, batch)), key=lambda r: r["context"])
        contexts = [row["context"] for row in here]
        ratio, times = grid[0][column], grid[1][column]
        bound, word = ("ceiling", "Amdahl ceiling") if "ceiling" in here[0] else ("limit", "byte-count limit")
        word = f"{here[0]['limit_kind']} limit" if "limit_kind" in here[0] else word
        ratio.plot(contexts, [row[bound] for row in here], color="0.5", linestyle="--", label=word)
        ratio.axhline(1, color="0.2", linewidth=1)
        best = [next(r for r in row["rivals"] if r["name"] == row["best_dense"]) for row in here]
        _plot(times, contexts, best, "seconds", "quartiles", 1e3, "0.2", "best dense")
        for name, colour in colours.items():
            line = _line(here, shape, batch, name)
            at, entries = [row["context"] for row, _ in line], [rival for _, rival in line]
            if entries:
                _plot(ratio, at, entries, "speedup", "speedup_quartiles", 1, colour, name)
                _plot(times, at, entries, "seconds", "quartiles", 1e3, colour, name)
        ratio.set_title(f"{_depth(here)}, batch {batch}", fontsize=10)
        ratio.set_ylabel("times the best dense")
        times.set_ylabel("ms, median and quartiles")
        ratio.set_ylim(bottom=0)
        if times.dataLim.y1 > 10 * times.dataLim.y0:
            times.set_yscale("log")
            times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            times.yaxis.set_major_formatter("{x:g}")
        else:
            times.set_ylim(bottom=0)
        times.set_xlabel("context, tokens")
        for axes in (ratio, times):
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [_short(context) for context in contexts])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.9")
    drawn: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=2 * min(len(panels), 2), frameon=False
    )
    return figure


def _plot(
    axes: Any, at: list[int], entries: list[Row], field: str, quartiles: str, unit: float, colour: str, label: str
) -> None:
    middle = [unit * entry[field] for entry in entries]
    low = [max(0.0, unit * (entry[field] - entry[quartiles][0])) for entry in entries]
    high = [max(0.0, unit * (entry[quartiles][1] - entry[field])) for entry in entries]
    axes.errorbar(at, middle, yerr=[low, high], color=colour, marker="o", markersize=4, capsize=2, label=label)


def _depth(rows: Sequence[Row]) -> str:
    shape: str = rows[0]["shape"]
    cut = sorted({row["layers"] for row in rows if row.get("layers", 0) != row.get("full_layers", 0)})
    return f"{shape} ({'-'.join(map(str, cut))} of {rows[0]['full_layers']} layers)" if cut else shape


def _short(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def _panels(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["shape"], row["batch"]) for row in rows))


def _names(rows: Sequence[Row], kind: str) -> list[str]:
    return list(dict.fromkeys(r["name"] for row in rows for r in row["rivals"] if r["kind"] == kind))


def _line(rows: Sequence[Row], shape: str, batch: int, name: str) -> list[tuple[Row, Row]]:
    found = [
        (row, rival)
        for row in rows
        if (row["shape"], row["batch"]) == (shape, batch)
        for rival in row["rivals"]
        if rival["name"] == name
    ]
    return sorted(found, key=lambda pair: int(pair[0]["context"]))
