"""Custom operators and forced buffers: workarounds for Dynamo and Inductor.

Each workaround names the torch version in which it was last needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@torch.library.custom_op("fasa_flex::realize", mutates_args=())
def realize(tensor: Tensor) -> Tensor:
    """Return a contiguous copy that Inductor materialises, since it cannot look into a custom operator.

    Inductor would inline the producer into its consumers. For a tensor that a mask function reads it then finds no CPU
    kernel, and mistakes a scatter for its empty base. For a query that scores every key it recomputes the query for
    every key, RoPE's sines and cosines included.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


@realize.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


realize.register_autograd(lambda context, gradient: gradient)


def compute_once(tensor: Tensor) -> Tensor:
    """Make Inductor's CPU backend materialise the tensor, without the microseconds of `realize`'s operator call.

    Inductor materialises the base of an as_strided view.
    """
    base = tensor.contiguous()
    return base.as_strided(base.shape, base.stride())


def read_as_floats(mask: Tensor) -> Tensor:
    """Return the same bool mask in a graph; for CPU, stored as floats and compared with 0 where it is read.

    Inductor's vector code loads bools six times as slowly as floats (torch 2.13), and every head and every pass loads
    the mask again.
    """
    if mask.device.type == "cpu":
        return compute_once(mask.to(torch.float32, memory_format=torch.contiguous_format)) > 0
    return mask


def keep_rounding(tensor: Tensor) -> Tensor:
    """Keep the rounding of 16-bit numbers in a compiled graph; others, and those with a gradient, are left alone.

    Inductor computes them in float32 and drops the casts that it fuses. It keeps a cast whose bits the graph reads; two
    views alone would cancel (torch 2.13).
    """
    if tensor.itemsize == 2 and not tensor.requires_grad:
        return tensor.view(torch.int16).bitwise_or(0).view(tensor.dtype)
    return tensor


def operator(
    name: str, fake: Callable[..., Any], devices: str = "default", mutates: tuple[str, ...] = ()
) -> Callable[[_Function], _Function]:
    """Decorator: register a function of tensors as the operator ``fasa_flex::name`` for compiled graphs.

    The decorated function takes no keyword arguments. It stays itself, so that an eager call has no wrapper: a decode
    step calls several operators per layer, and the three wrappers of `torch.library.custom_op` can take longer than the
    kernel launch. Dynamo traces the operator in its place.

    Args:
        name: name of the operator.
        fake: takes the same arguments and returns empty results of the right shapes and dtypes, for tracing.
        devices: device type that the function serves; "default": any.
        mutates: names of the arguments that the function writes to; it must not return any of its arguments.
    """

    def register(function: _Function) -> _Function:
        qualified = f"fasa_flex::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, devices)(function)
        torch.library.register_fake(qualified)(fake)
        compiled = getattr(torch.ops.fasa_flex, name)
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(lambda *args: compiled(*args))
        return function

    return register
