"""Callables and objects with `follow` that are of no class of `fasa_flex.core.scoring`, as scorers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from torch import Tensor

from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import Forward, Scorer, SequenceScorer

_A = TypeVar("_A", bound="_Adapted")


class _Adapted(Scorer):
    """A callable as a `Scorer`, with the members that it has."""

    def __init__(self, given: Any) -> None:
        self._given = given
        stated = ("reads", "attend", "estimates_logits", "completes_by_all", "stateful")
        vars(self).update({name: getattr(given, name) for name in stated if hasattr(given, name)})

    @property
    def name(self) -> str:
        return getattr(self._given, "__name__", type(self._given).__name__)

    @property
    def signature(self) -> tuple[Hashable, ...]:
        return (type(self._given).__qualname__,)

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        scores: Tensor = self._given(query, key, packed_keys)
        return scores

    def shard(self: _A, rank: int, ranks: int) -> _A:
        return type(self)(self._given.shard(rank, ranks)) if hasattr(self._given, "shard") else self


class _AdaptedSequence(_Adapted, SequenceScorer):
    """An object with `follow` as a `SequenceScorer`."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        if hasattr(given, "remembers"):
            self.stateful = given.remembers

    def follow(self, forward: Forward) -> Tensor:
        scores: Tensor = self._given.follow(forward)
        return scores


def as_scorer(given: object, layer: int | None = None) -> Scorer:
    """Return ``given`` as a `Scorer`: itself, or adapted if it is a callable, or has `follow`, and is of another class.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, Scorer):
        return given
    if hasattr(given, "follow"):
        return _AdaptedSequence(given)
    if not callable(given):
        of_layer = "" if layer is None else f" of layer {layer}"
        raise ValueError(f"the scorer{of_layer} is {given!r}, no Scorer or SequenceScorer; return one.")
    return _Adapted(given)
