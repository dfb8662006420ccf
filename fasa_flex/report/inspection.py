"""Statistics of profiles: dominant chunks, their agreement or variance, and the overlap between profiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, groupby

import torch
from torch import Tensor

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import FasaConfig, Sharing
from fasa_flex.core.criteria import Criterion

_HEADS = {"kv_head": "key/value head", "query_head": "query head"}
_LISTED = 12


def default_n_tip(profile: FasaProfile) -> int:
    """`FasaConfig`'s default number of dominant chunks for the profile's heads."""
    return FasaConfig().chunks_of(profile.layout.head_dim)


def is_dominant(
    profile: FasaProfile, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None
) -> Tensor:
    """`FasaProfile.dominant` as a mask: bool [layers, Hkv or Hq, chunks]."""
    kept = profile.dominant(n_tip, per, criterion)
    table = torch.zeros(*kept.shape[:2], profile.agreement.shape[2], dtype=torch.bool)
    return table.scatter_(-1, kept, True)


def dominance(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None) -> Tensor:
    """Share of all layers' heads in which each chunk is dominant: float32 [chunks], of sum ``n_tip``."""
    return is_dominant(profile, n_tip, per, criterion).float().mean((0, 1))


def measured(profile: FasaProfile, criterion: Criterion | None = None) -> Tensor:
    """The table that a criterion ranks by, agreement or variance: float32 [layers, query heads, chunks]."""
    if profile.criterion(criterion) == "agreement" or profile.variance is None:
        return profile.agreement
    return profile.variance


def strength(
    profile: FasaProfile, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of `measured` over a head's dominant chunks, and over all its chunks: each float32 [layers, Hkv or Hq]."""
    kept = is_dominant(profile, n_tip, per, criterion)
    layers, heads, chunks = kept.shape
    table = measured(profile, criterion).view(layers, heads, -1, chunks).mean(2)
    return (table * kept).sum(-1) / n_tip, table.mean(-1)


def choosing(profile: FasaProfile, per: Sharing = "kv_head") -> tuple[Criterion, ...]:
    """A profile's criteria that choose different chunks: without ``weighted_variance``, which only weights them."""
    distinct = ("agreement", "variance", "explained_variance") if per == "kv_head" else ("agreement", "variance")
    return tuple(criterion for criterion in profile.criteria if criterion in distinct)


def criteria_in_common(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head") -> Tensor:
    """Share of dominant chunks that each two criteria (`choosing`) have in common, averaged over a layer's heads.

    Returns:
        float32 [N, N, layers], 1 on the diagonal.
    """
    kept = torch.stack([is_dominant(profile, n_tip, per, criterion) for criterion in choosing(profile, per)]).float()
    return _common(kept, n_tip)


def place(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None) -> Tensor:
    """Mean place of the dominant chunks by frequency, from 0 (fastest) to 1 (slowest): float32 [layers].

    Unrotated chunks are the slowest. If the frequencies are not known, chunks count as slower in their order. Random
    sets have 0.5, and so has a layer without RoPE, whose chunks are equally slow.
    """
    chunks, known = profile.agreement.shape[2], profile.layout.frequencies
    speed = torch.zeros(chunks, dtype=torch.float64)
    speed[: profile.layout.n_rotated] = torch.arange(profile.layout.n_rotated, 0, -1) if known is None else known.abs()
    order = torch.empty(chunks).scatter_(0, speed.argsort(descending=True, stable=True), torch.arange(chunks).float())
    places = order[profile.dominant(n_tip, per, criterion)].mean((1, 2)) / max(1, chunks - 1)
    places[list(profile.layout.unrotated_layers)] = 0.5
    return places


def overlap(
    profiles: Sequence[FasaProfile], n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None
) -> Tensor:
    """Share of dominant chunks that each two profiles have in common, averaged over a layer's heads.

    Random sets have ``n_tip / chunks`` in common.

    Args:
        profiles: P profiles of one shape.
        n_tip: dominant chunks of a head.
        per: as in `FasaProfile.dominant`.
        criterion: as in `FasaProfile.dominant`; None is each profile's default.

    Returns:
        float32 [P, P, layers], 1 on the diagonal.

    Raises:
        ValueError: profiles of different shapes.
    """
    _check_alike(profiles)
    return _common(torch.stack([is_dominant(profile, n_tip, per, criterion) for profile in profiles]).float(), n_tip)


def _common(kept: Tensor, n_tip: int) -> Tensor:
    """Common share of each two sets: float32 [P, P, layers], of sets [P, layers, heads, chunks] of 0 and 1."""
    return torch.einsum("plhc,qlhc->pql", kept, kept) / (n_tip * kept.shape[2])


def period(profile: FasaProfile, chunk: int) -> str:
    """A chunk's period in tokens, such as ``8.4k``; ``∞`` if it does not rotate, ``?`` if not known."""
    frequencies = profile.layout.frequencies
    if chunk >= profile.layout.n_rotated:
        return "∞"
    if frequencies is None:
        return "?"
    tokens = 2 * math.pi / abs(float(frequencies[chunk]))
    power = min(int(math.log10(tokens)) // 3, 3)
    short = tokens / 1000**power
    return f"{short:.{int(power > 0 and short < 10)}f}{('', 'k', 'M', 'G')[power]}"


def report(
    names: Sequence[str],
    profiles: Sequence[FasaProfile],
    n_tip: int,
    per: Sharing = "kv_head",
    criterion: Criterion | None = None,
) -> str:
    """A report in Markdown: each profile, its criteria side by side, and the overlap of several profiles.

    Args:
        names: names of the profiles.
        profiles: one or more profiles of one shape.
        n_tip: dominant chunks of a head.
        per: as in `FasaProfile.dominant`.
        criterion: as in `FasaProfile.dominant`; None is each profile's default.

    Raises:
        ValueError: profiles of different shapes, ``n_tip`` out of range, or a criterion that a profile does not serve.
    """
    _check_alike(profiles)
    parts = []
    for name, profile in zip(names, profiles, strict=True):
        parts.append(_described(name, profile, n_tip, per, criterion))
        if len(choosing(profile, per)) > 1:
            parts.append(_criteria(profile, n_tip, per))
    if len(profiles) > 1:
        parts.append(_compared(names, profiles, n_tip, per, criterion))
    return "\n\n".join(parts)


def _described(name: str, profile: FasaProfile, n_tip: int, per: Sharing, criterion: Criterion | None) -> str:
    layers, query_heads, chunks = profile.agreement.shape
    origin, head = profile.provenance, _HEADS[per]
    versions = ", ".join(f"{package} {version}" for package, version in origin.versions.items())
    kept, strengths = profile.dominant(n_tip, per, criterion), strength(profile, n_tip, per, criterion)
    criterion = profile.criterion(criterion)
    still = ", ".join(map(str, profile.layout.unrotated_layers))
    quantity = "agreement" if criterion == "agreement" else "variance over keys"
    lines = [
        f"{name}: {origin.model_id} ({origin.model_type})",
        f"{layers} layers, {query_heads} query heads, {origin.kv_heads} key/value heads, {chunks} chunks, "
        f"{profile.layout.n_rotated} of which rotate{f', none in layers {still}' if still else ''}",
        f"agreement on the top {origin.top_k} keys, over {origin.queries} queries: {len(origin.sample_hashes)} samples,"
        f" at most {origin.max_new_tokens} decode steps each",
        f"calibrated with {versions or 'unknown versions'}; fingerprint {profile.fingerprint[:12]}",
        "",
        f"The {n_tip} dominant chunks of each {head} by {_words(criterion)}, their mean {quantity} and that of all "
        f"{chunks}:",
        "",
        f"| layer | {head} | chunks | dominant | all |",
        "|--:|--:|---|--:|--:|",
    ]
    lines += [
        f"| {layer} | {number} | {_ranges(kept[layer, number].tolist())} "
        f"| {strengths[0][layer, number]:.3f} | {strengths[1][layer, number]:.3f} |"
        for layer in range(layers)
        for number in range(kept.shape[1])
    ]
    lines.append(f"| all | all | | {strengths[0].mean():.3f} | {strengths[1].mean():.3f} |")
    shares = dominance(profile, n_tip, per, criterion)
    best = shares.argsort(descending=True, stable=True)[:_LISTED].tolist()
    lines += [
        "",
        f"Share of the {layers * kept.shape[1]} {head}s in which a chunk is dominant (chance: {n_tip / chunks:.0%}):",
        "",
        "| chunk | period in tokens | share of heads |",
        "|--:|--:|--:|",
        *(f"| {chunk} | {period(profile, chunk)} | {shares[chunk]:.0%} |" for chunk in best if shares[chunk] > 0),
    ]
    others = int((shares > 0).sum()) - len(best)
    if others > 0:
        lines.append(f"\n{others} more chunks are dominant in fewer heads, {int((shares == 0).sum())} in none.")
    return "\n".join(lines)


def _criteria(profile: FasaProfile, n_tip: int, per: Sharing) -> str:
    """A table of the overlap of criteria and the frequencies of their chunks, layer by layer."""
    criteria = choosing(profile, per)
    common, pairs = criteria_in_common(profile, n_tip, per), list(combinations(range(len(criteria)), 2))
    places = torch.stack([place(profile, n_tip, per, criterion) for criterion in criteria])
    table = torch.cat([torch.stack([common[pair] for pair in pairs]), places]).T
    names = [_words(criterion) for criterion in criteria]
    titles = [*(f"{names[a]} and {names[b]}" for a, b in pairs), *(f"place by {name}" for name in names)]
    return "\n".join(
        [
            f"The criteria side by side: the share of {n_tip} chunks that two have in common (random sets: "
            f"{n_tip / profile.agreement.shape[2]:.2f}), and the mean place by frequency of each one's chunks "
            "(0 the fastest, 1 the slowest):",
            "",
            "| layer | " + " | ".join(titles) + " |",
            "|--:|" + "--:|" * len(titles),
            *(_line(str(layer), values) for layer, values in enumerate(table.tolist())),
            _line("all", table.mean(0).tolist()),
        ]
    )


def _words(criterion: Criterion) -> str:
    return criterion.replace("_", " ")


def _line(title: str, values: Sequence[float]) -> str:
    return f"| {title} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def _compared(
    names: Sequence[str], profiles: Sequence[FasaProfile], n_tip: int, per: Sharing, criterion: Criterion | None
) -> str:
    common = overlap(profiles, n_tip, per, criterion)
    pairs = list(combinations(range(len(profiles)), 2))
    chance = n_tip / profiles[0].agreement.shape[2]
    layers = [_line(str(layer), [float(common[a, b, layer]) for a, b in pairs]) for layer in range(common.shape[2])]
    return "\n".join(
        [
            f"Dominant chunks in common, as a share of {n_tip} (random sets: {chance:.2f}):",
            "",
            *(f"{number}: {name}" for number, name in enumerate(names, 1)),
            "",
            "| layer | " + " | ".join(f"{a + 1} and {b + 1}" for a, b in pairs) + " |",
            "|--:|" + "--:|" * len(pairs),
            *layers,
            _line("all", [float(common[a, b].mean()) for a, b in pairs]),
        ]
    )


def _check_alike(profiles: Sequence[FasaProfile]) -> None:
    shapes = [(*profile.agreement.shape, profile.provenance.kv_heads) for profile in profiles]
    for profile, shape in zip(profiles, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"the profiles differ in shape: {_shape(shapes[0])} in that of {profiles[0].provenance.model_id}, "
                f"{_shape(shape)} in that of {profile.provenance.model_id}; compare profiles of one model."
            )


def _shape(shape: tuple[int, ...]) -> str:
    layers, query_heads, chunks, kv_heads = shape
    return f"{layers} layers of {query_heads} query heads, {kv_heads} key/value heads and {chunks} chunks"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours joined: ``0-3 7 9-10``."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda placed: placed[1] - placed[0])
    ]
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
