"""Models in wrappers: an adapter of PEFT, a compiled module, data parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> Any:
    """The transformers model that wrappers call, adapters and all; anything else as it is.

    Args:
        model: a transformers model, PEFT's around one (whose adapters are within it), what `torch.compile` makes of
            either, or a ``DistributedDataParallel``.
    """
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        within = model._modules
        if "_orig_mod" in within:
            model = within["_orig_mod"]
        elif base_of := getattr(type(model), "get_base_model", None):
            model = base_of(model)
        elif list(within) == ["module"]:
            model = within["module"]
        else:
            break
    return model
