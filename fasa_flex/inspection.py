"""What a profile says: which chunks are dominant, how strong they are, and how far profiles agree about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, groupby

import torch
from torch import Tensor

from fasa_flex.config import FasaConfig, Sharing
from fasa_flex.profile import FasaProfile

_HEADS = {"kv_head": "key/value head", "query_head": "query head"}
_LISTED = 12


def default_n_tip(profile: FasaProfile) -> int:
    """The dominant chunks that `enable` would use: ``FasaConfig``'s default."""
    return FasaConfig().chunks_of(profile.layout.head_dim)


def is_dominant(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head") -> Tensor:
    """`FasaProfile.dominant` as a table: bool [layers, Hkv or Hq, chunks]."""
    kept = profile.dominant(n_tip, per)
    table = torch.zeros(*kept.shape[:2], profile.agreement.shape[2], dtype=torch.bool)
    return table.scatter_(-1, kept, True)


def dominance(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head") -> Tensor:
    """Share of all layers' heads in which each chunk is dominant: float32 [chunks], sums to ``n_tip``."""
    return is_dominant(profile, n_tip, per).float().mean((0, 1))


def strength(profile: FasaProfile, n_tip: int, per: Sharing = "kv_head") -> tuple[Tensor, Tensor]:
    """Mean agreement of a head's dominant chunks, and of all its chunks: each float32 [layers, Hkv or Hq]."""
    kept = is_dominant(profile, n_tip, per)
    layers, heads, chunks = kept.shape
    table = profile.agreement.view(layers, heads, -1, chunks).mean(2)
    return (table * kept).sum(-1) / n_tip, table.mean(-1)


def overlap(profiles: Sequence[FasaProfile], n_tip: int, per: Sharing = "kv_head") -> Tensor:
    """Share of their dominant chunks that profiles have in common, the mean over a layer's heads.

    Random sets would have ``n_tip / chunks`` in common.

    Args:
        profiles: P of them, of one shape.
        n_tip: Chunks a head keeps.
        per: As in `FasaProfile.dominant`.

    Returns:
        float32 [P, P, layers], 1 on the diagonal.

    Raises:
        ValueError: profiles of different shapes.
    """
    _check_alike(profiles)
    kept = torch.stack([is_dominant(profile, n_tip, per) for profile in profiles]).float()
    return torch.einsum("plhc,qlhc->pql", kept, kept) / (n_tip * kept.shape[2])


def period(profile: FasaProfile, chunk: int) -> str:
    """The distance in tokens over which a chunk turns once, ``8.4k``; ``∞`` if it never does, ``?`` if not known."""
    frequencies = profile.layout.frequencies
    if chunk >= profile.layout.n_rotated:
        return "∞"
    if frequencies is None:
        return "?"
    tokens = 2 * math.pi / abs(float(frequencies[chunk]))
    power = min(int(math.log10(tokens)) // 3, 3)
    short = tokens / 1000**power
    return f"{short:.{int(power > 0 and short < 10)}f}{('', 'k', 'M', 'G')[power]}"


def report(names: Sequence[str], profiles: Sequence[FasaProfile], n_tip: int, per: Sharing = "kv_head") -> str:
    """All of it as text: every profile on its own, then what several have in common.

    Args:
        names: Of the profiles, in their order.
        profiles: One or more; of one shape.
        n_tip: Chunks a head keeps.
        per: As in `FasaProfile.dominant`.

    Raises:
        ValueError: profiles of different shapes, or ``n_tip`` out of range.
    """
    _check_alike(profiles)
    parts = [_described(name, profile, n_tip, per) for name, profile in zip(names, profiles, strict=True)]
    if len(profiles) > 1:
        parts.append(_compared(names, profiles, n_tip, per))
    return "\n\n".join(parts)


def _described(name: str, profile: FasaProfile, n_tip: int, per: Sharing) -> str:
    layers, query_heads, chunks = profile.agreement.shape
    made, head = profile.provenance, _HEADS[per]
    versions = ", ".join(f"{package} {version}" for package, version in made.versions.items())
    kept, strengths = profile.dominant(n_tip, per), strength(profile, n_tip, per)
    lines = [
        f"{name}: {made.model_id} ({made.model_type})",
        f"{layers} layers, {query_heads} query heads, {made.kv_heads} key/value heads, {chunks} chunks, "
        f"{profile.layout.n_rotated} of which turn",
        f"agreement on the top {made.top_k} keys, over {made.queries} queries: {len(made.sample_hashes)} samples, "
        f"at most {made.max_new_tokens} decode steps each",
        f"made with {versions or 'unknown versions'}; fingerprint {profile.fingerprint[:12]}",
        "",
        f"The {n_tip} dominant chunks of each {head}, their mean agreement and that of all {chunks}:",
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
    shares = dominance(profile, n_tip, per)
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


def _compared(names: Sequence[str], profiles: Sequence[FasaProfile], n_tip: int, per: Sharing) -> str:
    common = overlap(profiles, n_tip, per)
    pairs = list(combinations(range(len(profiles)), 2))
    chance = n_tip / profiles[0].agreement.shape[2]

    def line(title: str, values: Sequence[float]) -> str:
        return f"| {title} | " + " | ".join(f"{value:.2f}" for value in values) + " |"

    layers = [line(str(layer), [float(common[a, b, layer]) for a, b in pairs]) for layer in range(common.shape[2])]
    return "\n".join(
        [
            f"Dominant chunks in common, as a share of {n_tip} (random sets: {chance:.2f}):",
            "",
            *(f"{number}: {name}" for number, name in enumerate(names, 1)),
            "",
            "| layer | " + " | ".join(f"{a + 1} and {b + 1}" for a, b in pairs) + " |",
            "|--:|" + "--:|" * len(pairs),
            *layers,
            line("all", [float(common[a, b].mean()) for a, b in pairs]),
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
