"""Every knob of the method, validated once."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fasa_flex.budget import Budget, check_count
from fasa_flex.packing import PackedDtype
from fasa_flex.spread import LayerBudgets, check_layer_budgets

Sharing = Literal["kv_head", "query_head"]
GroupReduce = Literal["max", "mean", "softmax", "none"]
Backend = Literal["auto", "fastest", "flex", "gather", "triton", "reference"]
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
        layer_budgets: how ``n_fac``, the mean over sparse layers, is spread over them: ``"uniform"``, ``"pyramid"``
            (falling with depth, as PyramidKV's), or a weight for each layer of the model, or for each of a layer's
            key/value heads (`fasa_flex.spread`).
        dense_layers: layers that keep dense attention.
        per: ``"kv_head"``: one chunk set per key/value head; ``"query_head"``: one per query head, as in the paper.
        group_reduce: how the scores of a GQA group become one ranking: ``"softmax"`` (mean attention weight; measured
            best, evals/results/choices.json), ``"max"``, ``"mean"``, or ``"none"`` for a selection per query head
            (always so with ``per="query_head"``).
        backend: ``"flex"`` (compiled `flex_attention`), ``"gather"`` (selected rows, then SDPA), ``"triton"`` (our
            kernels for decoding on CUDA), ``"reference"`` (plain loops), or ``"auto"``: triton where it can, flex on
            CUDA elsewhere, gather without CUDA. ``"fastest"``: triton where it can, gather
            compiled elsewhere (tens of seconds at first), and dense where that was measured to be faster
            (`fasa_flex.crossover`): for speed, not for evaluation.
        prefill: what a forward of several tokens does: ``"dense"``, or ``"sparse"``: every query selects for itself.
        packed_dtype: precision of packed keys: ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a scale for each key);
            None: the cache's. They only rank: a lower one changes a few selected keys, never their attention.

    Raises:
        ValueError: a value out of its range.
    """

    n_tip: int | None = None
    n_fac: int | float = 256
    n_sink: int = 0
    n_recent: int = 0
    layer_budgets: LayerBudgets = "uniform"
    dense_layers: tuple[int, ...] = (0,)
    per: Sharing = "kv_head"
    group_reduce: GroupReduce = "softmax"
    backend: Backend = "auto"
    prefill: Prefill = "dense"
    packed_dtype: PackedDtype | None = None

    def __post_init__(self) -> None:
        if self.n_tip is not None:
            check_count("n_tip", self.n_tip, 1)
        given: Any = self.n_fac
        if not isinstance(given, bool) and isinstance(given, numbers.Real):  # NumPy's, too
            object.__setattr__(self, "n_fac", int(given) if isinstance(given, numbers.Integral) else float(given))
        if not isinstance(self.n_fac, int | float):
            raise ValueError(
                f"n_fac must be one number, got {self.n_fac!r}; weigh layers and heads with layer_budgets."
            )
        _ = self.budget
        try:
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        except TypeError:
            raise ValueError(
                f"dense_layers must be a sequence of layer numbers, got {self.dense_layers!r}; write (0,)."
            ) from None
        for layer in self.dense_layers:
            check_count("each of dense_layers", layer, 0)
        object.__setattr__(self, "layer_budgets", check_layer_budgets(self.layer_budgets))
        for name, choices in (
            ("per", Sharing),
            ("group_reduce", GroupReduce),
            ("backend", Backend),
            ("prefill", Prefill),
        ):
            check_choice(name, getattr(self, name), choices)
        if self.packed_dtype is not None:
            check_choice("packed_dtype", self.packed_dtype, PackedDtype)

    @property
    def budget(self) -> Budget:
        """``n_fac``, ``n_sink`` and ``n_recent`` as one."""
        return Budget(self.n_fac, self.n_sink, self.n_recent)

    def chunks_of(self, head_dim: int) -> int:
        """``n_tip`` for heads of ``head_dim`` dimensions: as given, or an eighth of them."""
        return max(1, head_dim // 8) if self.n_tip is None else self.n_tip

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**dataclasses.asdict(self), "dense_layers": list(self.dense_layers)}


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not one of the literals ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
