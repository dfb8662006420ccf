"""The table of backends, and the choice of the backend that computes a `Call`.

A row of the table has two functions: one gives the reason why the backend cannot serve a call, the other computes it. A
backend chosen by name serves the call or raises an error; "auto" and "fastest" try a list of backends in order.

    triton      our kernels: one query per batch row, keys packed by a cache, CUDA; the fastest for decoding
    flex        Inductor's kernel of `flex_attention` with a block mask: the definition; any number of queries
    gather      selected rows copied to a buffer: any device, any call, gradients
    compiled    gather in a graph of its own; chosen by "fastest" alone
    reference   plain loops, for tests
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from fasa_flex.backends.gather import gather_focused
from fasa_flex.backends.specialization import attend_compiled
from fasa_flex.backends.triton.dispatch import decode_by_kernels, why_no_kernels
from fasa_flex.core.config import Backend
from fasa_flex.core.group_reduce import reduce_group
from fasa_flex.core.method import Call, attend, flex_focused
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.reference import reference_attention

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One backend.

    Attributes:
        why_not: returns the reason why the backend cannot serve a call, or None if it can; None: it serves every call.
        run: computes the call's attention, [B, Hq, Q, Dv].
    """

    why_not: Callable[[Call], str | None] | None
    run: Callable[[Call], Tensor]


def sparse_attention(call: Call, backend: Backend) -> Tensor:
    """Compute sparse attention of every query, [B, Hq, Q, Dv].

    Raises:
        ValueError: ``backend`` names one backend and it cannot serve the call, or an argument of the call is wrong.
    """
    reasons = []
    for name in ORDER.get((backend, call.query.is_cuda), (backend,)):
        row = BACKENDS[name]
        reason = row.why_not and row.why_not(call)
        if reason is None:
            if name != backend and not torch.compiler.is_compiling():
                _tell(backend, name, call.query.shape[2] == 1, call.query.device.type)
            return row.run(call)
        reasons.append(reason)
    raise ValueError(f"backend {backend!r} cannot serve this call: {reasons[0]}; use backend='auto'.")


@functools.cache
def _tell(backend: str, chosen: str, decodes: bool, device: str) -> None:
    queries = "one query a row" if decodes else "several queries a row"
    _log.info("backend %r is %r for %s on %s", backend, chosen, queries, device)


def _why_not_all_keys(call: Call) -> str | None:
    """The reason why a backend that reads all keys and attends to the selected ones cannot serve a call."""
    if call.key.device != call.query.device:
        return "it reads keys on the query's device, and they are in host memory"
    return f"{call.scorer.name} attends by itself" if call.scorer.attend else None


def _why_no_flex(call: Call) -> str | None:
    states = (call.query, call.key, call.value)
    reason = _why_not_all_keys(call)
    if reason is not None:
        return reason
    if call.query.is_cuda and call.query.dtype == torch.float32:
        return "torch has no kernel of it for blocks of 16 keys in float32 on a GPU"  # torch 2.11
    if torch.is_grad_enabled() and any(each.requires_grad for each in states):
        return "it computes no gradients (torch.no_grad() asks for none)"
    if call.query.device.type == "cpu" and call.softmax.sinks is not None:
        return "it has no learned sinks on CPU"
    return None


def _by_flex(call: Call) -> Tensor:
    """Compile in any case: eager `flex_attention` ignores block lists and computes every score."""
    packed = call.packed_keys
    if call.query.device.type == "cpu" and isinstance(packed, PackedKeys):
        lengths = (call.key.shape[2], packed.tiles.shape[2])
        one_graph = torch.compiler.is_compiling() and all(map(has_static_value, lengths))
        if not one_graph or call.query.shape[2] > 1:
            call.packed_keys = None  # Inductor's C++ for two dynamic lengths does not compile (torch 2.13)
    return attend_compiled(call, flex_focused)


def _by_loops(call: Call) -> Tensor:
    scores = call.scorer(call.query, call.key, call.packed_keys)
    ranking = reduce_group(scores, call.valid, call.group_reduce, call.softmax, call.known_marks().sample)
    states = (call.query, call.key, call.value)
    return reference_attention(*states, ranking, call.valid, call.budget, call.softmax, scores, call.completion)


BACKENDS = {
    "triton": Row(why_no_kernels, decode_by_kernels),
    "flex": Row(_why_no_flex, _by_flex),
    "gather": Row(None, functools.partial(attend, focus=gather_focused)),
    "compiled": Row(_why_not_all_keys, lambda call: attend_compiled(call, gather_focused)),
    "reference": Row(_why_not_all_keys, _by_loops),
}
ORDER = {
    ("auto", True): ("triton", "flex", "gather"),
    ("auto", False): ("gather",),
    ("fastest", True): ("triton", "compiled", "gather"),
    ("fastest", False): ("compiled", "gather"),
}
"""Backends that "auto" and "fastest" try in order, by whether the query is on CUDA."""
