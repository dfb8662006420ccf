"""Access to a transformers model inside wrappers: PEFT adapters, compiled modules, data parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside wrappers, with its adapters; return anything else unchanged.

    Args:
        model: a transformers model, a PEFT model (its adapters are inside the transformers model), the result of
            `torch.compile` for either, or a ``DistributedDataParallel``.
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
