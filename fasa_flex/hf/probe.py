"""A probing forward, which records the arguments of every layer's attention and its rotated queries.

`RotaryLayout.detect` probes with all weights. `enable` with a profile runs a `glance`, which skips the linear layers:
its cost does not grow with their size.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fasa_flex.hf.arrival import Arrival
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult
from fasa_flex.hf.attention_routing import AttentionSeam
from fasa_flex.hf.compatibility import CACHE_NAMES, cache_argument, check_arrivals, check_transformers
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.made_up_states import MadeUpStates, pattern
from fasa_flex.hf.model_structure import (
    attention_modules,
    attention_shape,
    decoder_layers,
    device_of,
    evaluating,
    maximum_positions,
)
from fasa_flex.hf.wrappers import run_decoder

_FARTHEST = 1024
"""Last position that is probed, if the model allows it."""


class ProbeError(ValueError):
    """The model could not run the probing forward; its own error is the cause.

    Args:
        what: what failed, with the model's own error in brackets.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; check that the model runs, or use a family such as Llama or Qwen.")
        self.what = what


def farthest_position(model: PreTrainedModel) -> int:
    """Last position at which to probe a model."""
    return min(_FARTHEST, (maximum_positions(model) or _FARTHEST + 1) - 1)


def check_attention(model: PreTrainedModel) -> dict[int, str]:
    """Check by a `glance` that the model's attention receives the expected arguments.

    A model that cannot run, such as one without data, is not checked; a warning gives the reason.

    Returns:
        the layers that FASA leaves dense because of these arguments, each with the reason (`why_dense`).

    Raises:
        ValueError: the model's attention cannot be reached, or an argument is not as expected.
    """
    try:
        return why_dense(model, glance(model))
    except ProbeError as error:
        warnings.warn(f"{error.what}, so what arrives at its attention is not checked.", stacklevel=3)
        return {}


def why_dense(model: PreTrainedModel, arrivals: Mapping[int, Arrival]) -> dict[int, str]:
    """Find the layers that FASA cannot serve, by their behaviour in a probing forward; each with the reason."""
    layers, heads, kv_heads, head_dim = attention_shape(model)
    reasons = {}
    for layer in range(layers):
        arrived = arrivals.get(layer)
        if arrived is None:
            reasons[layer] = "no attention to the text, as in a cross-attention or recurrent layer"
        elif arrived.calls > 1:
            reasons[layer] = f"{arrived.calls} passes in one forward, which share no selection"
        elif (sizes := _sizes(arrived)) != (heads, kv_heads, head_dim, head_dim):
            reasons[layer] = (
                f"{sizes[0]} query heads of {sizes[2]} dimensions on {sizes[1]} key heads of {sizes[3]}, where the "
                f"config states {heads} on {kv_heads} of {head_dim}"
            )
        elif not arrived.keeps_keys:
            reasons[layer] = "no keys of its own in the cache, since it attends to another layer's"
    return reasons


def _sizes(arrived: Arrival) -> tuple[int, int, int, int]:
    return arrived.query.shape[1], arrived.key_shape[1], arrived.query.shape[3], arrived.key_shape[3]


def glance(model: PreTrainedModel) -> dict[int, Arrival]:
    """Run a `probe` with four tokens that skips the linear layers; errors are those of `probe`."""
    hidden = pattern(model.config.get_text_config().hidden_size, torch.device("cpu"), torch.float32)
    last = farthest_position(model)
    return probe(model, hidden[None], sorted({0, 1, last // 16, last}))


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    hidden: Tensor,
    positions: Sequence[int],
    *,
    weights: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[int, Arrival]:
    """Run a forward with equal hidden states at all positions, attention outputs of 0, and a growing cache.

    Behind a decoder layer with a recurrent state or a convolution the hidden states of all positions are those of the
    first. So hidden states do not depend on the position in any layer, and queries differ by RoPE alone. The first
    position is masked like padding. Afterwards the model has its former attention implementation, training mode and
    dynamic RoPE, and the random state is unchanged.

    Args:
        model: the model, whose head does not run.
        hidden: float [rows, hidden_size], hidden states of each row.
        positions: P position numbers.
        weights: whether linear layers compute; otherwise each returns fixed states, the same for all tokens of a row.
        dtype: dtype of the hidden states; operations that then refuse mixed dtypes run in float32. None: the model's.

    Returns:
        arguments of the attention, by layer number, over the heads of all ranks.

    Raises:
        ValueError: the model's attention cannot be reached, or an argument is not as expected.
        ProbeError: the model cannot run.
    """
    shard, base = HeadShard.of(model), model.base_model
    modules = attention_modules(model)
    check_transformers(base, modules)
    received: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    arrivals: dict[int, Arrival] = {}

    thread = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # other threads may be generating
            received[module] = args, kwargs

    def capture(call: AttentionCall) -> AttentionResult:
        query, layer = call.query, call.layer
        args, kwargs = received.get(call.module, ((), {}))
        calls = arrivals[layer].calls + 1 if layer in arrivals else 1
        arrivals[layer] = Arrival(
            call.module,
            frozenset(name for name, argument in kwargs.items() if argument is not None),
            bool(args) or "hidden_states" in kwargs,
            next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), Cache)), None),
            query if query.is_meta else query.cpu(),
            call.key.shape,
            call.value.shape,
            call.mask,
            call.options,
            calls,
        )
        batch, heads, q_len = query.shape[:3]
        return query.new_zeros(batch, q_len, heads, call.value.shape[-1], dtype=call.value.dtype), None

    cache, rows, length, device = DynamicCache(config=model.config), len(hidden), len(positions), device_of(model)
    with ExitStack() as stack:
        for restored in (evaluating(model), _unstretched(model), AttentionSeam(model, capture), _uncompiled()):
            stack.enter_context(restored)
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        for stateful in _stateful_layers(model, cache, modules.values()):
            stack.callback(stateful.register_forward_hook(partial(_levelled, (rows, length))).remove)
        embeddings = hidden[:, None].to(device, dtype or model.dtype).expand(-1, length, -1).contiguous()
        mask = torch.ones(rows, length, dtype=torch.long, device=device)
        mask[:, 0] = 0
        casts = dtype is not None and dtype != model.dtype
        stack.enter_context(MadeUpStates(None if weights else rows, casts, embeddings))
        inputs = {
            "attention_mask": mask,
            "position_ids": torch.tensor([positions], device=device).expand(rows, -1),
            "use_cache": True,
        }
        first: Exception | None = None
        for run, given in _ways_to_run(model, cache, embeddings):
            arrivals.clear()
            try:
                run(**inputs, **given)
                break
            except Exception as error:  # the model's code, or missing weights, may raise anything
                first = first or error
        else:
            reason = f"{type(first).__name__}: {first}".splitlines()[0]
            raise ProbeError(f"{type(base).__name__} cannot run a probing forward ({reason})") from first
    caches = [arrived.cache for arrived in arrivals.values() if isinstance(arrived.cache, DynamicCache)]
    cache = next((own for own in caches if own is cache), next(iter(caches), cache))
    layers: list[Any] = cache.layers
    for layer, arrived in arrivals.items():
        shard.check(arrived.query, arrived.key_shape[1], f"layer {layer} of {type(base).__name__}")
        has_keys = layer < len(layers) and getattr(layers[layer], "keys", None) is not None
        arrivals[layer] = replace(arrived.whole(shard), keeps_keys=arrived.cache is cache and has_keys)
    check_arrivals(base, cache, arrivals)
    return dict(sorted(arrivals.items()))


def _ways_to_run(
    model: PreTrainedModel, cache: DynamicCache, embeddings: Tensor
) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """Forwards with their inputs: a model that cannot run with the first ones may take the next.

    They are embeddings and our cache, a cache that the model makes, token ids instead (their embeddings are made up),
    and the decoder alone, without the towers around it.
    """
    states, own = {"inputs_embeds": embeddings}, cache_argument(model.base_model, cache)
    ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    for given in (states | own, states, {"input_ids": ids} | own):
        yield partial(run_decoder, model), given
    decoder = model.base_model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model.base_model:
        yield decoder, states | cache_argument(decoder, DynamicCache(config=model.config))


def _stateful_layers(model: PreTrainedModel, cache: DynamicCache, attention: Iterable[nn.Module]) -> list[nn.Module]:
    """The decoder layers that keep a state in the cache, as recurrent layers and convolutions do."""
    places = {place for place, kept in enumerate(cache.layers) if isinstance(kept, LinearAttentionCacheLayerMixin)}
    lists = decoder_layers(model, attention) if places else []
    return [layer for layers in lists for place, layer in enumerate(layers) if place in places]


def _levelled(shape: tuple[int, int], layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hook that gives all positions of the hidden states [*shape, width] which a layer returns those of the first."""

    def level(states: Tensor) -> Tensor:
        return states[:, :1].repeat(1, shape[1], 1) if states.dim() == 3 and states.shape[:2] == shape else states

    return tree_map_only(Tensor, level, output)


_stance_lock = threading.RLock()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Context that runs compiled modules eagerly; it does nothing if Dynamo is not loaded.

    The compiler stance is global: threads probe one after another, so that none restores a stance set by another.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _stance_lock, torch.compiler.set_stance("force_eager"):  # the call sets it, before the context is entered
        yield


@contextmanager
def _unstretched(model: nn.Module) -> Iterator[None]:
    """Context that restores the frequencies of rotary modules, which dynamic RoPE stretches in longer forwards."""
    rotary = [module for module in model.modules() if any("inv_freq" in name for name in module._buffers)]
    states = [(dict(module._buffers), {k: v for k, v in vars(module).items() if k != "_buffers"}) for module in rotary]
    try:
        yield
    finally:
        for module, (buffers, others) in zip(rotary, states, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)
            module.__dict__.update(others)
