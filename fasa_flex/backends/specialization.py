"""Compilation of `attend`, one function per static signature, within Dynamo's limit of graphs per function."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional as F

from fasa_flex.backends.gather import whole_buffer
from fasa_flex.core.method import Call, Focus, attend, flex_focused
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import Given
from fasa_flex.core.selection import Marks

Step = Callable[..., Tensor]


def attend_compiled(call: Call, focus: Focus) -> Tensor:
    """Run `attend` compiled for the call's static signature; while the caller compiles, it joins the caller's graph."""
    if torch.compiler.is_compiling():
        return attend(call, focus)
    call.known_marks()
    if isinstance(call.packed_keys, PackedKeys):
        call = _with_room(call, call.packed_keys)
    q_len = call.query.shape[2]
    queries = min(q_len, 2)
    if focus is flex_focused and q_len > 1 and call.query.device.type == "cpu":
        # Inductor's C++ for two dynamic lengths does not compile (torch 2.13): one number of queries per graph
        call = _padded_to_power_of_two(call)
        queries = call.query.shape[2]
    batch, query_heads, _, head_dim = call.query.shape
    shape = (batch, query_heads, call.key.shape[1], head_dim, queries, call.query.dtype, call.query.device.type)
    return _compiled(focus, *shape, *_situation(call))(call, focus)[:, :, :q_len]


@functools.cache
def _compiled(*signature: object) -> Step:
    """Return the compiled `attend` of one static signature.

    Dynamo allows 8 specialisations per code object. Sizes that differ between functions of one name become symbols,
    which flex's decode kernel refuses for batch and heads. Each signature therefore compiles a function of its own, in
    which only lengths vary, and further ones if the limit is reached, such as for scorers that differ by layer.
    """
    return specialized(attend, signature)


def specialized(function: Callable[..., Any], signature: object, dynamic: bool | None = None) -> Callable[..., Any]:
    """Return ``function`` compiled apart for one static signature; the caller caches the result by it.

    Args:
        function: a function without a closure.
        signature: all that may not vary between the calls of the result.
        dynamic: argument of `torch.compile`.
    """

    def compile_another(number: int) -> Callable[..., Any]:
        name = f"{function.__name__}_{hashlib.sha256(repr((signature, number)).encode()).hexdigest()[:8]}"
        copy = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
        return torch.compile(copy, fullgraph=True, dynamic=dynamic)

    return _beyond_the_limit(compile_another)


def _with_room(call: Call, packed: PackedKeys) -> Call:
    """Replace keys and values by the buffers of a growing cache, with free slots invalid: one length until full."""
    keys, values = whole_buffer(call.key), whole_buffer(call.value)
    if not keys.shape[2] == values.shape[2] <= packed.capacity:
        return call
    kv_len = call.key.shape[2]
    free = keys.shape[2] - kv_len
    marks = call.known_marks().with_room(kv_len, free)
    return replace(call, key=keys, value=values, valid=F.pad(call.valid, (0, free)), marks=marks)


def _situation(call: Call) -> tuple[Hashable, ...]:
    """List the properties besides sizes that a graph is specialised for: modes, layouts, settings, given arguments."""
    packed, scorer, completion, softmax = call.packed_keys, call.scorer, call.completion, call.softmax
    precision = (packed.tiles.dtype, packed.scales is None) if isinstance(packed, PackedKeys) else None
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(call.query.device.type),
        *map(_layout, (call.query, call.key, call.value)),
        call.value.shape[3],
        call.valid.shape[0],
        type(scorer).__qualname__,
        scorer.signature,
        *map(_shape, call.known_marks()),
        None if completion is None else (completion.strength, completion.state is None, completion.by_all),
        softmax.sinks is None,
        type(packed).__name__,
        precision,
        call.budget,
        call.group_reduce,
        softmax.scaling,
        softmax.softcap,
    )


def _shape(states: Tensor | None) -> tuple[int, ...] | None:
    """The first two sizes, which do not grow with the cache."""
    return None if states is None else tuple(states.shape[:2])


def _layout(states: Tensor) -> tuple[bool, ...]:
    outer, head, row, _ = states.stride()
    return states.is_contiguous(), outer >= head, head >= row, states.is_inference(), states.requires_grad


def _padded_to_power_of_two(call: Call) -> Call:
    """Append queries without valid keys up to a power of two, so that few numbers of queries are compiled."""
    q_len, scorer, marks = call.query.shape[2], call.scorer, call.known_marks()
    extra = (1 << (q_len - 1).bit_length()) - q_len
    if isinstance(scorer, Given):
        scorer = Given(F.pad(scorer.scores, (0, 0, 0, extra)))

    def padded(states: Tensor, fill: float = 0) -> Tensor:
        return F.pad(states, (0, 0, 0, extra), value=fill)

    forced = None if marks.forced is None else padded(marks.forced)
    sample = None if marks.sample is None else padded(marks.sample, -1)
    marks = Marks(forced, sample)
    return replace(call, query=padded(call.query), valid=padded(call.valid), marks=marks, scorer=scorer)


def _beyond_the_limit(compile_another: Callable[[int], Callable[..., Any]]) -> Callable[..., Any]:
    """Return a step that compiles another function whenever the earlier ones have reached Dynamo's limit of graphs.

    Args:
        compile_another: takes a number, counted from 0, and returns the compiled function of this number.
    """
    steps = [compile_another(0)]

    def call(*args: Any) -> Any:
        for step in steps:
            try:
                return step(*args)
            except FailOnRecompileLimitHit:
                continue
        steps.append(compile_another(len(steps)))
        return steps[-1](*args)

    return call
