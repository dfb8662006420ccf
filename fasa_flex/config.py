"""Every knob of the method, validated once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Sharing = Literal["kv_head", "query_head"]
GroupReduce = Literal["max", "mean", "softmax", "none"]
Backend = Literal["auto", "flex", "gather", "reference"]
Prefill = Literal["dense", "sparse"]


@dataclass(frozen=True)
class FasaConfig:
    """How a model attends under FASA (Wang et al., 2026: TIP and FAC).

    Args:
        n_tip: dominant frequency chunks a head scores with; ``None`` is ``head_dim // 8`` (16 of 64 chunks at 128).
        n_fac: the budget, tokens a query attends to: an int counts tokens, a float in (0, 1] is a share of the query's
            valid keys, rounded up.
        n_sink: first valid tokens that are always selected, inside the budget.
        n_recent: last valid tokens that are always selected, inside the budget.
        dense_layers: layers that keep dense attention.
        per: ``"kv_head"``: one chunk set per key/value head; ``"query_head"``: one per query head, as in the paper.
        group_reduce: how the scores of a GQA group become one ranking: ``"softmax"`` (mean attention weight; measured
            best, evals/results/choices.json), ``"max"``, ``"mean"``, or ``"none"`` for a selection per query head
            (always so with ``per="query_head"``).
        backend: ``"flex"`` (compiled `flex_attention`), ``"gather"`` (selected rows, then SDPA), ``"reference"`` (plain
            loops), or ``"auto"``: flex on CUDA, gather elsewhere.
        prefill: what a forward of several tokens does: ``"dense"``, or ``"sparse"``: every query selects for itself.

    Raises:
        ValueError: a value out of its range.
    """

    n_tip: int | None = None
    n_fac: int | float = 256
    n_sink: int = 0
    n_recent: int = 0
    dense_layers: tuple[int, ...] = (0,)
    per: Sharing = "kv_head"
    group_reduce: GroupReduce = "softmax"
    backend: Backend = "auto"
    prefill: Prefill = "dense"

    def __post_init__(self) -> None:
        if self.n_tip is not None:
            _check_count("n_tip", self.n_tip, 1)
        check_budget(self.n_fac, self.n_sink, self.n_recent)
        try:
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        except TypeError:
            raise ValueError(
                f"dense_layers must be a sequence of layer numbers, got {self.dense_layers!r}; write (0,)."
            ) from None
        for layer in self.dense_layers:
            _check_count("each of dense_layers", layer, 0)
        for name, choices in (
            ("per", Sharing),
            ("group_reduce", GroupReduce),
            ("backend", Backend),
            ("prefill", Prefill),
        ):
            check_choice(name, getattr(self, name), choices)

    def chunks_of(self, head_dim: int) -> int:
        """``n_tip`` for heads of ``head_dim`` dimensions: as given, or an eighth of them."""
        return max(1, head_dim // 8) if self.n_tip is None else self.n_tip

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**dataclasses.asdict(self), "dense_layers": list(self.dense_layers)}


def check_budget(n_fac: int | float, n_sink: int, n_recent: int) -> None:
    """Refuse a budget that is no positive count or share in (0, 1], or is smaller than its forced tokens."""
    if isinstance(n_fac, float):
        if not 0.0 < n_fac <= 1.0:
            raise ValueError(f"n_fac as a share must lie in (0, 1], got {n_fac}; an int counts tokens instead.")
    else:
        _check_count("n_fac", n_fac, 1)
    _check_count("n_sink", n_sink, 0)
    _check_count("n_recent", n_recent, 0)
    if not isinstance(n_fac, float) and n_sink + n_recent > n_fac:
        raise ValueError(
            f"n_sink + n_recent = {n_sink + n_recent} exceeds the budget n_fac = {n_fac}; "
            "forced tokens count inside the budget, so raise n_fac or force fewer."
        )


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not one of the literals ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
