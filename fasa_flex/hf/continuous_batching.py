"""What transformers' continuous batching hands to attention, and where its paged cache keeps keys and values.

A forward of continuous batching packs the new tokens of several requests into one row. transformers passes indices of
cache rows to the attention function, but neither the requests nor the lengths of their prompts; they are read from the
`ModelRunner` that called the model, on the call stack.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.model_runner import ModelRunner

from fasa_flex.hf.attention_call import AttentionCall, DenseAttention
from fasa_flex.hf.generation import find_frame
from fasa_flex.hf.model_structure import attention_lookup, own_config

PAGED = "write_index"
"""Keyword argument that attention receives in every forward of continuous batching, and in no other."""

_MADE_UP = "__warmup_"
"""Begin of the ids of requests that no user sent."""

_PASSED_ON = ("dropout", "scaling", "softcap", "s_aux", "sliding_window")
"""Keyword arguments of attention that do not depend on the cache."""


class Request(NamedTuple):
    """The part of one request in a packed forward.

    Attributes:
        name: id of the request.
        start: place of its first new token in the packed row.
        past: number of its tokens in the cache before the forward.
        new: number of its tokens in the forward.
        prompt: length of its prompt; a token behind it was generated, even if it is computed again after an eviction.
    """

    name: str
    start: int
    past: int
    new: int
    prompt: int

    @property
    def end(self) -> int:
        """Number of its tokens in the cache after the forward."""
        return self.past + self.new

    @property
    def tokens(self) -> slice:
        """Its new tokens in the packed row."""
        return slice(self.start, self.start + self.new)


def requests_of_forward(real: bool = False) -> list[Request]:
    """Find the requests of the calling forward, in the order of the packed row.

    Args:
        real: whether to leave out those that a manager makes up to capture graphs before its first request.

    Raises:
        ValueError: the forward was not started by a manager of continuous batching.
    """
    frame = find_frame(sys._getframe(1), ModelRunner.compute_batch.__code__)
    if frame is None:
        raise ValueError(
            "the model was called with a paged cache outside of transformers' ContinuousBatchingManager, so that FASA "
            "cannot tell its requests apart; use generate_batch or the manager, or disable() FASA first."
        )
    inputs = frame.f_locals["self"].inputs_and_outputs
    if hasattr(inputs, "io_pairs"):  # asynchronous batching prepares one of two batches while the other is computed
        inputs = inputs.io_pairs[inputs.current_pair].host_io
    requests, start = [], 0
    for future in inputs.requests_in_batch:
        state, new = future.state, future.query_length
        prompt = state._true_initial_tokens or len(state.initial_tokens)
        if real and state.request_id.startswith(_MADE_UP):
            continue
        requests.append(Request(state.request_id, start, state.position_offset - new, new, prompt))
        start += new
    return requests


class Capture(NamedTuple):
    """How a manager captures the calling forward in a CUDA graph: it runs it once, then again for the graph.

    Attributes:
        graph: the graph; None in the first run, which computes the result.
        run: runs the model on the manager's current batch.
        again: runs and captures it, and keeps the graph in place of an earlier one.
    """

    graph: Any
    run: Callable[[], None]
    again: Callable[[], None]


def capture_of_forward() -> Capture | None:
    """Find the capture that the calling forward belongs to; None: there is none."""
    frame = find_frame(sys._getframe(1), ModelRunner._capture_graph.__code__)
    if frame is None:
        return None
    names = frame.f_locals
    forward, arguments = names["forward_fn"], names["args"]
    again = functools.partial(names["self"]._capture_graph, forward, names["compute_stream"], *arguments)
    return Capture(names.get("graph"), functools.partial(forward, *arguments), again)


class Pages(NamedTuple):
    """Where the paged cache keeps the keys and values of one layer.

    Token t of a request is in row ``blocks[t // page] * stride + t % page`` of ``keys`` and ``values``.

    Attributes:
        keys: float [R, Hkv, D], a view of the cache.
        values: float [R, Hkv, Dv], likewise.
        page: number of tokens in a block.
        stride: distance of two blocks in rows.
        tables: the blocks of every request, by its id; shared by the layers of a group.
        trash: a block that is written, but never read.
    """

    keys: Tensor
    values: Tensor
    page: int
    stride: int
    tables: Mapping[str, list[int]]
    trash: int

    @property
    def blocks(self) -> int:
        """Number of blocks in the cache, with those that no request gets."""
        return -(-len(self.keys) // self.stride)


def pages_of(cache: Any, layer: int) -> Pages:
    """Return the pages of layer number ``layer`` in a ``PagedAttentionCache``."""
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        keys, values = (pages.flatten(0, 1) for pages in allocator.get_cache_for_block_table(layer))
        stride = allocator.block_physical_stride
        trash = allocator.write_trash_index // stride
        return Pages(keys, values, allocator.tokens_per_page, stride, allocator.block_table, trash)
    group, index = cache.layer_index_to_group_indices[layer]  # transformers 5.17
    tables = cache.group_cache_managers[group].block_table
    page, trash = cache.block_size, cache.write_trash_index // cache.block_size
    return Pages(cache.key_cache[index], cache.value_cache[index], page, page, tables, trash)


def writes_alone(options: dict[str, Any]) -> dict[str, Any]:
    """Change the arguments of an attention module so that its cache writes new tokens and reads no earlier ones."""
    return {**options, "read_index": [index[:0] for index in options["read_index"]]}


def is_written(options: dict[str, Any]) -> bool:
    """Whether the attention module has written the new keys and values, from its attention function's arguments.

    Since transformers 5.24 the module updates the cache, and before that the attention function. With a block table
    the attention kernel writes in all releases.
    """
    return "cache" not in options and options.get("block_table") is None


def reads_pages(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether `attention_now` reads the keys of these arguments; with a block table only flash attention does."""
    return options.get("block_table") is None or "flash" in own_config(module)._attn_implementation


def attention_now(module: nn.Module) -> DenseAttention:
    """Return the attention function that the model's own config names now; a manager may have changed the name."""
    lookup = attention_lookup(module)
    assert lookup is not None
    interface, eager = lookup
    function: DenseAttention = interface.get_interface(own_config(module)._attn_implementation, eager)
    return function


def needs_mask(module: nn.Module, q_len: int, kv_len: int) -> bool:
    """Whether `attend_alone` needs the mask of a request's last ``q_len`` tokens among ``kv_len``."""
    name = own_config(module)._attn_implementation
    return "flash" not in name and q_len > 1 and (kv_len > q_len or "eager" in name)


def attend_alone(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute dense attention of requests without the paged cache, each row a request: [B, Q, Hq, Dv].

    Args:
        call: the call for all requests.
        query: float [B, Hq, Q, D], the last Q tokens of each request.
        key: float [B, Hkv, T, D].
        value: float [B, Hkv, T, Dv].
        valid: bool [B, 1, Q, T], the keys of each query if requests differ in length, or as `needs_mask` says; None:
            those up to the query's own.
    """
    name = own_config(call.module)._attn_implementation
    dense = call.dense
    if "flash" in name and valid is None:  # its mask is causal from the last key on
        dense = attention_now(call.module)
    mask = valid
    if mask is not None and "eager" in name:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    kept = {each: call.options[each] for each in _PASSED_ON if each in call.options}
    return dense(call.module, query, key, value, mask, **kept)[0]
