"""Frequency chunks of a model, their ranking by several criteria, and the profile that stores both."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Names of the module ``fasa_flex.calibration``, which this package replaced."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fasa_flex.calibration.from_texts"), name)
