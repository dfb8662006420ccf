"""What a compiler must not look into, and what it must compute before it goes on.

Each workaround names the torch version in which it was last needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@torch.library.custom_op("fasa_flex::realize", mutates_args=())
def realize(tensor: Tensor) -> Tensor:
    """A contiguous copy that the compiler keeps as a buffer, since a custom operator is opaque to it.

    Inductor inlines what was computed in the same graph into what reads it. Where a mask function reads it, it then
    finds no kernel on CPU, and takes a scatter for its empty base. Where every key is scored with it, it computes the
    query anew for every key, sines and cosines included.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


@realize.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


realize.register_autograd(lambda context, gradient: gradient)


def compute_once(tensor: Tensor) -> Tensor:
    """The same tensor, in a graph for CPU only: a buffer there, as from `realize`, but without a call of microseconds.

    What as_strided views, Inductor makes a buffer of.
    """
    whole = tensor.contiguous()
    return whole.as_strided(whole.shape, whole.stride())


def read_as_floats(mask: Tensor) -> Tensor:
    """The same bool mask; compiled for CPU, a comparison of floats made once.

    Inductor's vector code takes six times as long to load bools as it does floats (torch 2.13), and every head and pass
    loads the mask anew.
    """
    if torch.compiler.is_compiling() and mask.device.type == "cpu":
        return compute_once(mask.to(torch.float32, memory_format=torch.contiguous_format)) > 0
    return mask


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
