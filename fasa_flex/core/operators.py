"""Functions that a compiler is not to look into: operators in its graph, and themselves in an eager call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(
    name: str, fake: Callable[..., Any], devices: str = "default", mutates: tuple[str, ...] = ()
) -> Callable[[_Function], _Function]:
    """Make a function of tensors the operator ``fasa_flex::name`` of compiled graphs; it takes no keyword arguments.

    Eagerly it stays the function: a decode step calls several in each layer, and `torch.library.custom_op`'s three
    layers around it, with their checks of every result, may take longer than launching its kernel.

    Args:
        name: of the operator.
        fake: what it returns, by shape and dtype, of the same arguments: a compiler runs it in the function's stead.
        devices: the device type that it is for; "default" is any.
        mutates: the arguments that it writes to; its results are none of its arguments.
    """

    def register(function: _Function) -> _Function:
        qualified = f"fasa_flex::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, devices)(function)
        torch.library.register_fake(qualified)(fake)
        compiled = getattr(torch.ops.fasa_flex, name)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return compiled(*args) if torch.compiler.is_compiling() else function(*args)

        return cast(_Function, call)

    return register
