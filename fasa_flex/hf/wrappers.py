"""Access to a transformers model inside wrappers: PEFT adapters, compiled modules, data parallelism, FSDP2."""

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


def run_decoder(model: PreTrainedModel, **arguments: Any) -> None:
    """Run a forward without the output head; a model that FSDP2 shards (``fully_shard``) runs with it.

    FSDP2 gathers parameters from the root module on: a forward that begins below the root makes every later one fail.

    Args:
        model: the model.
        arguments: keyword arguments of its forward.
    """
    if hasattr(type(model), "set_reshard_after_forward"):  # torch's FSDPModule, which is not imported for this
        model(**arguments, logits_to_keep=1)
    else:
        model.base_model(**arguments)
