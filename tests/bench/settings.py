"""Settings of a benchmark run on the smallest shape."""

from __future__ import annotations

import torch

from fasa_flex.bench.settings import Settings

CPU = torch.device("cpu")


def settings(**changes: object) -> Settings:
    fields = {"device": CPU, "dtype": torch.float32, "shapes": ("tiny",), "contexts": (64,), "batches": (1,)}
    return Settings(**{**fields, **changes})
