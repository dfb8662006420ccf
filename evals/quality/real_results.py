"""Results of real models: reading and joining of files, and paired comparisons of arms."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evals.quality.real_arms import Arm

Results = dict[str, Any]


def opened(path: Path, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> Results:
    """The results in a file, or empty ones; exits if the file has other settings or an arm with other options."""
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    for key, value in settings.items():
        if results.get(key, value) != value:
            sys.exit(f"{path} holds results of another {key} ({results[key]} and not {value}); choose another --out.")
    for name, arm in arms.items():
        known, own = results.setdefault("arms", {}).setdefault(name, arm.record()), arm.record()
        if known and own and not _holds(own, known):
            sys.exit(f"{path} holds results of {name!r} with other options or defaults; choose another --out.")
        results["arms"][name] = own
    return {
        "windows": {},
        "needles": {},
        "bytes_read_share": {},
        "block_share": {},
        "seconds": 0.0,
        **results,
        **settings,
    }


def _holds(own: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether an arm equals the file's, which may be older and have fewer fields."""
    rest = ({key: value for key, value in record.items() if key != "config"} for record in (known, own))
    return known["config"].items() <= own["config"].items() and next(rest) == next(rest)


def joined(parts: Sequence[Results]) -> Results:
    """Join results with the same settings; command, date and machine are the last one's."""
    whole = dict(parts[-1])
    for kind in ("windows", "needles"):
        of_kind: dict[str, dict[str, float]] = {}
        for part in parts:
            for name, scores in part[kind].items():
                of_kind.setdefault(name, {}).update(scores)
        order = sorted(of_kind, key=lambda name: tuple(map(int, name.split("/"))))
        whole[kind] = {name: of_kind[name] for name in order}
    for key in ("arms", "bytes_read_share", "block_share"):
        whole[key] = {name: value for part in parts for name, value in part.get(key, {}).items()}
    return whole


class Interval(NamedTuple):
    """Mean of paired differences, its 95 % interval (Student's t), and the number of pairs."""

    mean: float
    low: float
    high: float
    count: int


def interval(differences: Iterable[float]) -> Interval:
    """The interval of at least two differences."""
    values = torch.tensor(list(differences), dtype=torch.float64)
    mean, count = float(values.mean()), len(values)
    half = _student(count - 1) * float(values.std()) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish-Fisher, within 1 % from 4 degrees of freedom on)."""
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def pairs(results: Results, kind: str, arm: str, other: str, length: int | None = None) -> list[tuple[float, float]]:
    """Pairs of two arms' scores on the same documents, of one length or all."""
    return [
        (scores[arm], scores[other])
        for name, scores in results[kind].items()
        if arm in scores and other in scores and length in (None, int(name.split("/")[0]))
    ]


def perplexity(results: Results, arm: str, length: int | None = None, other: str = "dense") -> Interval | None:
    """Ratio of two arms' perplexities on the same windows: geometric mean and interval; None for fewer than two."""
    found = pairs(results, "windows", arm, other, length)
    if len(found) < 2:
        return None
    nats = interval(own - others for own, others in found)
    return Interval(*map(math.exp, nats[:3]), nats.count)


def found(results: Results, arm: str, length: int | None = None, other: str = "dense") -> Interval | None:
    """Difference of two arms' shares of found needles; None for fewer than two prompts."""
    both = pairs(results, "needles", arm, other, length)
    return interval(own - others for own, others in both) if len(both) > 1 else None


def bytes_of(results: Results, arm: str, length: int) -> float | None:
    """Share of a dense step's bytes that an arm's sparse layers read, for a 16-bit cache."""
    share: float | None = 1.0 if arm == "dense" else results["bytes_read_share"].get(f"{arm} @ {length // 100 * 100}")
    return share


def summary(results: Results) -> list[str]:
    """A line for each arm: relative perplexity with its interval and found needles, by length."""
    lines = []
    window_lengths, needle_lengths = (
        sorted({int(name.split("/")[0]) for name in results[kind]}) for kind in ("windows", "needles")
    )
    for arm in results["arms"]:
        line = f"{arm:48s}"
        for length in window_lengths:
            ratio = perplexity(results, arm, length)
            if ratio:
                line += f" ppl @{length} x{ratio.mean:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] ({ratio.count})"
        for length in needle_lengths:
            hits = [own for own, _ in pairs(results, "needles", arm, arm, length)]
            line += f"  {length}: {sum(hits):.0f}/{len(hits)}" if hits else ""
        lines.append(line)
    return lines
