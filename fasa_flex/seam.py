"""The seam: route a model's attention calls through a function of ours, and back.

transformers looks the attention function up by the name in the model's config. A seam registers one name of its own for
one model, sets it, and puts the former name back: no class and no module is patched, and two models never meet.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fasa_flex.expectations import IMPLEMENTATIONS

_names = (f"fasa_{number}" for number in itertools.count())

AttentionResult = tuple[Tensor, Tensor | None]


class DenseAttention(Protocol):
    """The model's own attention: q [B, Hq, Q, D], k and v [B, Hkv, T, D] -> ([B, Q, Hq, D], weights or None)."""

    def __call__(  # noqa: D102 - the class says it
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> AttentionResult: ...


SeamFunction = Callable[..., AttentionResult]
"""What is routed through a seam: called as `DenseAttention` is, with the model's own attention as first argument."""


class AttentionSeam:
    """Route every attention call of ``model`` through ``function`` until `close`.

    Attributes:
        former: the attention implementation that the model had, and gets back.

    Raises:
        ValueError: the model's attention cannot be replaced by name, or is routed already.
    """

    def __init__(self, model: PreTrainedModel, function: SeamFunction) -> None:
        former = model.config._attn_implementation
        if former not in IMPLEMENTATIONS:
            raise ValueError(
                f"the model's attention implementation is {former!r}; "
                "undo what set it, or call model.set_attn_implementation('sdpa'), then try again."
            )
        name = next(_names)
        dense = _eager_attention if former == "eager" else AttentionInterface._global_mapping[former]

        def routed(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> AttentionResult:
            return function(dense, module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, routed)
        AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[former])
        self.former: str = former
        self._model = weakref.ref(model)
        self._unregister = weakref.finalize(model, _unregister, name)
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            self._unregister()
            raise ValueError(
                f"{type(model).__name__} does not take its attention function by name (AttentionInterface), so FASA "
                "cannot reach its queries and keys; use a family that does, such as Llama or Qwen."
            )

    def close(self) -> None:
        """Give the model its former attention back; closing twice does nothing."""
        model = self._model()
        if self._unregister.alive and model is not None:
            model.set_attn_implementation(self.former)
            self._unregister()

    def __enter__(self) -> AttentionSeam:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unregister(name: str) -> None:
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> AttentionResult:
    eager: Callable[..., AttentionResult] = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)
