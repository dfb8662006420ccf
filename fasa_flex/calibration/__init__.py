"""Frequency chunks of a model, the criteria that rank them, and the profile that keeps them."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """A name of the module that stood here before the package."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fasa_flex.calibration.from_texts"), name)
