"""Settings of a benchmark run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fasa_flex.bench.options import BACKENDS as BACKENDS
from fasa_flex.bench.options import MODES as MODES
from fasa_flex.bench.shapes import SHAPES, Shape
from fasa_flex.core.budget import Budget, check_count
from fasa_flex.core.config import Completion, FasaConfig, GroupReduce
from fasa_flex.core.packed_keys import PackedDtype
from fasa_flex.errors import StateError


@dataclass(frozen=True)
class Settings:
    """Settings of one benchmark run.

    Attributes:
        device: device of the run.
        dtype: dtype of weights, queries, keys and values.
        shapes: names in `SHAPES`.
        contexts: keys of a row, the decoded token's included.
        batches: numbers of rows.
        n_tip: dominant chunks of a head; None: as in `FasaConfig`.
        n_fac: tokens a query attends to.
        group_reduce: how a GQA group's heads rank keys together.
        packed_dtype: dtype of packed keys; None: the cache's.
        completion: estimate for the unselected keys, as in `FasaConfig`.
        modes: "eager", "compiled" or both.
        backends: FASA's backends, of `BACKENDS`; in the op part also "permuted", without packed keys
            (`Inputs.permuted`).
        repeats: most rounds of a row.
        seconds: time for the rounds of one row, checked after the first few.
        layers: layers of the model in the step part; None: as many as fit.
        dense_layers: dense layers in the step part; None: layer 0 of a whole model, none of a cut one, in which one
            layer would be too large a share.
        shares: shares of the blocks that a block of queries attends to in the prefill part.
        times_model: whether the prefill part also times a model's first token.
        static_lengths: compile each context separately; otherwise torch makes lengths dynamic at the second one.

    Raises:
        ValueError: a value out of range.
        RuntimeError: no CUDA device.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    n_tip: int | None = None
    n_fac: int = 256
    group_reduce: GroupReduce = FasaConfig().group_reduce
    packed_dtype: PackedDtype | None = FasaConfig().packed_dtype
    completion: Completion = "first_order"
    modes: tuple[str, ...] = MODES
    backends: tuple[str, ...] = BACKENDS
    repeats: int = 15
    seconds: float = 10.0
    layers: int | None = None
    dense_layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    times_model: bool = True
    static_lengths: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.shapes if name not in SHAPES]
        if unknown:
            raise ValueError(f"unknown shape {unknown[0]!r}; known are {', '.join(SHAPES)}.")
        for name, values in (("contexts", self.contexts), ("batches", self.batches)):
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be positive integers, got {values}; write --{name} 4096,16384.")
        for name, chosen, known in (("modes", self.modes, MODES), ("backends", self.backends, (*BACKENDS, "permuted"))):
            if not chosen or set(chosen) - set(known):
                raise ValueError(f"{name} must be of {', '.join(known)}, got {', '.join(chosen) or 'none'}.")
        for name, number in (("n_tip", self.n_tip), ("n_fac", self.n_fac), ("layers", self.layers)):
            if number is not None:
                check_count(name, number, 1)
        check_count("repeats", self.repeats, 1)
        for share in self.shares:
            FasaConfig(prefill_share=share)
        for layer in self.dense_layers or ():
            check_count("each of dense_layers", layer, 0)
        for shape in (SHAPES[name] for name in self.shapes):
            if self.chunks_of(shape) > shape.head_dim // 2:
                raise ValueError(
                    f"n_tip must be at most {shape.head_dim // 2}, the chunks of a head of shape {shape.name!r}, "
                    f"got {self.n_tip}."
                )
            depth = min(shape.layers, self.layers or shape.layers)
            if max(self.dense_layers or (0,)) >= depth:
                raise ValueError(
                    f"dense_layers of {depth} layers of shape {shape.name!r} must be below {depth}, got "
                    f"{max(self.dense_layers or ())}; count from 0."
                )
        if not self.seconds >= 0:
            raise ValueError(f"seconds for a row must not be negative, got {self.seconds}.")
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device.type!r}.")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise StateError("no CUDA device is available; use --device cpu.")

    @property
    def dynamic(self) -> bool | None:
        """The argument ``dynamic`` of `torch.compile`."""
        return False if self.static_lengths else None

    @property
    def budget(self) -> Budget:
        """The budget ``n_fac``, with `FasaConfig`'s forced tokens."""
        return FasaConfig(n_fac=self.n_fac).budget

    @property
    def strength(self) -> float:
        """The completion's strength, as `FasaConfig.completion_strength`; 0 unless it is of first order."""
        return FasaConfig().completion_strength if self.completion == "first_order" else 0.0

    def chunks_of(self, shape: Shape) -> int:
        """Dominant chunks of a shape's head."""
        return FasaConfig().chunks_of(shape.head_dim) if self.n_tip is None else self.n_tip

    def to_dict(self) -> dict[str, Any]:
        """The settings that decide a row's numbers, JSON-ready."""
        names = {name: value for name, value in vars(self).items() if name not in ("shapes", "contexts", "batches")}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in names.items()},
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def quick(settings: Settings) -> Settings:
    """The settings for the option ``--quick``: a tiny shape and two contexts."""
    smallest: dict[str, Any] = {"shapes": ("tiny",), "contexts": (64, 128), "batches": (1,), "n_fac": 16}
    fastest: dict[str, Any] = {"modes": ("eager",), "backends": ("gather",), "repeats": 3, "seconds": 0.2}
    return replace(settings, **smallest, **fastest)
