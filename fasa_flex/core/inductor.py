"""What the compiler must compute before it goes on."""

from __future__ import annotations

import torch
from torch import Tensor


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
