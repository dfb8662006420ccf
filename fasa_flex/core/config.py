"""The settings of the method, `FasaConfig`, and their validation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args

from fasa_flex.core.budget import Budget, check_count, plain_number
from fasa_flex.core.criteria import Criterion
from fasa_flex.core.layer_budgets import LayerBudgets, check_layer_budgets
from fasa_flex.core.option_types import Backend as Backend
from fasa_flex.core.option_types import Completion as Completion
from fasa_flex.core.option_types import GroupReduce as GroupReduce
from fasa_flex.core.option_types import PackedDtype as PackedDtype
from fasa_flex.core.option_types import Prefill as Prefill
from fasa_flex.core.option_types import PrefillCompletion as PrefillCompletion
from fasa_flex.core.option_types import Sharing as Sharing


@dataclass(frozen=True)
class FasaConfig:
    """Settings of a model's attention under FASA (Wang et al., 2026: TIP and FAC).

    With the defaults, real models match dense attention at 128 to 256 of 8192 tokens (evals/README.md);
    `FasaConfig.paper` gives the paper's method.

    Args:
        n_tip: number of dominant frequency chunks that score the keys in each head: an int is a number of chunks, a
            float in (0, 1] a share of the head's chunks, rounded (0.5: 32 of 64 chunks at 128 dimensions).
        n_fac: the budget, tokens that a query attends to: an int is a number of tokens, a float in (0, 1] a share of
            the query's valid keys, rounded up.
        n_sink: number of first valid tokens that are always selected and count towards ``n_fac``; None: 4, or an eighth
            of a budget below 32.
        n_recent: number of last valid tokens that are always selected and count towards ``n_fac``; None: 32, or half of
            a budget below 64.
        layer_budgets: how the mean budget ``n_fac`` is spread over the sparse layers: ``"uniform"``, ``"pyramid"``
            (falls with depth, as in PyramidKV), or a weight for each layer of the model or for each of a layer's
            key/value heads (`fasa_flex.core.layer_budgets`).
        dense_layers: numbers of the layers that keep dense attention.
        per: ``"kv_head"``: one chunk set per key/value head; ``"query_head"``: one per query head, as in the paper.
        criterion: how the profile chooses the chunks (`fasa_flex.core.criteria`): ``"variance"``, ``"agreement"`` (the
            paper's), ``"explained_variance"`` or ``"weighted_variance"``; None: variance, or agreement if an older
            profile holds no variances.
        group_reduce: how the scores of a GQA group become one ranking: ``"softmax"`` (the sum of the heads' attention
            weights, normalised over a fixed sample of keys), ``"softmax_exact"`` (normalised over all keys),
            ``"max"``, ``"mean"``, or ``"none"`` for a selection per query head (always so with ``per="query_head"``).
        backend: ``"flex"`` (compiled `flex_attention`), ``"gather"`` (selected rows, then SDPA), ``"triton"`` (our
            kernels for decoding on CUDA), ``"reference"`` (plain loops), or ``"auto"``: triton if it can serve the
            call, otherwise flex on CUDA and gather without CUDA. ``"fastest"``: triton if it can serve the call,
            otherwise compiled gather (compiling takes tens of seconds), and dense attention for the sizes at which it
            was measured to be faster (`fasa_flex.model.crossover`): for speed, not for evaluation.
        prefill: attention of a forward of several tokens: ``"dense"``; ``"blocks"``: each block of 128 queries attends
            to the blocks of keys that an estimate ranks best (`fasa_flex.prefill`), for speed; or ``"sparse"``: every
            query selects its keys, as in decoding, for evaluation.
        prefill_share: with blocks, the largest share of the blocks up to its own that a block of queries attends to, in
            (0, 1]; the first block, its own and the one before it always are among them.
        prefill_mass: with blocks, the share of the estimated attention, in (0, 1], that they have to hold: a block of
            queries attends to no more of them than it takes; None: to as many as ``prefill_share`` allows.
        prefill_completion: with blocks, ``"mean"``: the mean key and value of each block that is left out stand for its
            tokens; ``"none"``: they have weight 0.
        packed_dtype: precision of packed keys: ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"int4"`` (with a scale
            for each key); None: the cache's. Packed keys only rank: a lower precision changes a few selected keys,
            never their attention. With chunk sets per query head nothing is packed; scores read the cache's keys.
        completion: estimate of the unselected keys' contribution (`fasa_flex.core.completion`): ``"first_order"``,
            ``"mean"`` (their mean value, as in SparQ) or ``"none"`` (weight 0, as in the paper); None: first_order for
            chunk sets per key/value head, none for other methods, since their caches keep no state for it.
        completion_strength: lambda, the factor of the first-order term.

    Raises:
        ValueError: a value is out of its range.
    """

    n_tip: int | float = 0.5
    n_fac: int | float = 256
    n_sink: int | None = None
    n_recent: int | None = None
    layer_budgets: LayerBudgets = "uniform"
    dense_layers: tuple[int, ...] = (0,)
    per: Sharing = "kv_head"
    criterion: Criterion | None = None
    group_reduce: GroupReduce = "softmax"
    backend: Backend = "auto"
    prefill: Prefill = "dense"
    prefill_share: float = 0.3
    prefill_mass: float | None = None
    prefill_completion: PrefillCompletion = "none"
    packed_dtype: PackedDtype | None = "int4"
    completion: Completion | None = None
    completion_strength: float = 0.75

    def __post_init__(self) -> None:
        numbers = ("n_tip", "n_fac", "n_sink", "n_recent", "completion_strength", "prefill_share", "prefill_mass")
        for name in numbers:
            value = getattr(self, name)
            if value is None and name == "n_tip":
                value = type(self).n_tip
            object.__setattr__(self, name, plain_number(value))
        if not isinstance(self.n_tip, float):
            check_count("n_tip", self.n_tip, 1)
        elif not 0.0 < self.n_tip <= 1.0:
            raise ValueError(f"n_tip as a share of a head's chunks must lie in (0, 1], got {self.n_tip}.")
        if not isinstance(self.completion_strength, int | float) or not math.isfinite(self.completion_strength):
            raise ValueError(f"completion_strength must be a finite number, got {self.completion_strength!r}.")
        _ = self.budget
        try:
            object.__setattr__(self, "dense_layers", tuple(map(plain_number, self.dense_layers)))
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
            ("prefill_completion", PrefillCompletion),
        ):
            check_choice(name, getattr(self, name), choices)
        for name, choices in (("packed_dtype", PackedDtype), ("completion", Completion), ("criterion", Criterion)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        self._check_prefill()

    def _check_prefill(self) -> None:
        for name, share in (("prefill_share", self.prefill_share), ("prefill_mass", self.prefill_mass)):
            if share is None and name == "prefill_mass":
                continue
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
                raise ValueError(f"{name} must be a share in (0, 1], got {share!r}.")
        for name, unset in (("prefill_mass", None), ("prefill_completion", "none")):
            if self.prefill != "blocks" and getattr(self, name) != unset:
                given = f"{name}={getattr(self, name)!r}"
                raise ValueError(f"{given} is for prefill='blocks', and prefill is {self.prefill!r}; leave one out.")
        if self.prefill == "blocks" and self.backend in ("triton", "reference"):
            raise ValueError(f"prefill='blocks' runs on flex or gather, not {self.backend!r}; use backend='auto'.")

    @classmethod
    def paper(cls, **changes: Any) -> FasaConfig:
        """Settings of the paper's method (Wang et al., 2026), with ``changes`` to single fields.

        Each query head scores with a quarter of its chunks, chosen by agreement, in the cache's precision, and selects
        for itself; there are no forced tokens, no completion and no dense layers.
        """
        fields: dict[str, Any] = {
            "n_tip": 0.25,
            "n_sink": 0,
            "n_recent": 0,
            "dense_layers": (),
            "per": "query_head",
            "criterion": "agreement",
            "group_reduce": "softmax_exact",
            "packed_dtype": None,
            "completion": "none",
        }
        return cls(**{**fields, **changes})

    @property
    def budget(self) -> Budget:
        """``n_fac``, ``n_sink`` and ``n_recent`` as one `Budget`."""
        return Budget.stated(self.n_fac, self.n_sink, self.n_recent)

    def chunks_of(self, head_dim: int) -> int:
        """Number of chunks that ``n_tip`` means for a head of ``head_dim // 2`` chunks."""
        return max(1, round(self.n_tip * (head_dim // 2))) if isinstance(self.n_tip, float) else self.n_tip

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**dataclasses.asdict(self), "dense_layers": list(self.dense_layers)}


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not among the literals of the type ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
