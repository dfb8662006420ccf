"""A probing forward, which records the arguments of every layer's attention and its rotated queries.

`RotaryLayout.detect` probes with all weights. `enable` with a profile runs a `glance`, which skips the linear layers:
its cost does not grow with their size.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import Cache, DynamicCache, PreTrainedModel

from fasa_flex.hf.arrival import Arrival
from fasa_flex.hf.attention_routing import AttentionResult, AttentionSeam, DenseAttention
from fasa_flex.hf.compatibility import CACHE_NAMES, cache_argument, check_arrivals, check_transformers
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import (
    NO_ROPE,
    attention_modules,
    attention_shape,
    device_of,
    evaluating,
    layer_of,
    maximum_positions,
)
from fasa_flex.hf.wrappers import run_decoder

_FARTHEST = 1024
"""Last position that is probed, if the model allows it."""


class ProbeError(ValueError):
    """The model could not run the probing forward; its own error is the cause."""


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
        warnings.warn(f"{error}, so what arrives at its attention is not checked.", stacklevel=3)
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
        elif arrived.rotates is False:
            reasons[layer] = NO_ROPE
    return reasons


def _sizes(arrived: Arrival) -> tuple[int, int, int, int]:
    return arrived.query.shape[1], arrived.key_shape[1], arrived.query.shape[3], arrived.key_shape[3]


def glance(model: PreTrainedModel) -> dict[int, Arrival]:
    """Run a `probe` with four tokens that skips the linear layers; errors are those of `probe`."""
    hidden = _pattern(model.config.get_text_config().hidden_size, torch.device("cpu"), torch.float32)
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

    Hidden states then do not depend on the position in any layer, so that queries differ by RoPE alone. The first
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

    def capture(
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> AttentionResult:
        args, kwargs = received.get(module, ((), {}))
        layer = layer_of(module)
        calls = arrivals[layer].calls + 1 if layer in arrivals else 1
        arrivals[layer] = Arrival(
            module,
            frozenset(name for name, argument in kwargs.items() if argument is not None),
            bool(args) or "hidden_states" in kwargs,
            next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), Cache)), None),
            query if query.is_meta else query.cpu(),
            key.shape,
            value.shape,
            attention_mask,
            options,
            calls,
        )
        batch, heads, q_len = query.shape[:3]
        return value.new_zeros(batch, q_len, heads, value.shape[-1]), None

    cache, rows, length, device = DynamicCache(config=model.config), len(hidden), len(positions), device_of(model)
    with ExitStack() as stack:
        for restored in (evaluating(model), _unstretched(model), AttentionSeam(model, capture), _uncompiled()):
            stack.enter_context(restored)
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        embeddings = hidden[:, None].to(device, dtype or model.dtype).expand(-1, length, -1).contiguous()
        mask = torch.ones(rows, length, dtype=torch.long, device=device)
        mask[:, 0] = 0
        stack.enter_context(_MadeUp(None if weights else rows, casts=dtype is not None and dtype != model.dtype))
        try:
            run_decoder(
                model,
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=torch.tensor([positions], device=device).expand(rows, -1),
                use_cache=True,
                **cache_argument(model, cache),
            )
        except Exception as error:  # the model's code, or missing weights, may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ProbeError(f"{type(base).__name__} cannot run a probing forward ({reason})") from error
    layers: list[Any] = cache.layers
    for layer, arrived in arrivals.items():
        shard.check(arrived.query, arrived.key_shape[1], f"layer {layer} of {type(base).__name__}")
        has_keys = layer < len(layers) and getattr(layers[layer], "keys", None) is not None
        arrivals[layer] = replace(arrived.whole(shard), keeps_keys=arrived.cache is cache and has_keys)
    check_arrivals(base, cache, arrivals)
    return dict(sorted(arrivals.items()))


class _MadeUp(TorchFunctionMode):
    """Mode in which linear layers return fixed states of the right shape and read no weights.

    Args:
        rows: batch rows, each with fixed states of its own, the same for all its tokens; None: linear layers compute.
        casts: whether an operation that refuses mixed float dtypes is repeated with float32 copies of its arguments.
    """

    def __init__(self, rows: int | None, casts: bool) -> None:
        super().__init__()
        self._rows, self._casts = rows, casts
        self._patterns: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._rows is not None and func is F.linear and len(args) > 1:
            return self._states(self._rows, *args[:2])
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            widened = tree_map_only(Tensor, _widened, (args, kwargs))
            if not self._casts or func in _WRITES:
                raise
            return func(*widened[0], **widened[1])

    def _states(self, rows: int, states: Tensor, weight: Tensor) -> Tensor:
        key = (weight.shape[0], states.device, states.dtype)
        if key not in self._patterns:
            self._patterns[key] = _pattern(*key) if rows == 1 else _patterns(rows, *key)
        pattern = self._patterns[key]
        if rows == 1:
            return pattern.repeat(*states.shape[:-1], 1)
        if states.dim() < 3 or len(states) != rows:
            return pattern[0].repeat(*states.shape[:-1], 1)
        return pattern.view(rows, *[1] * (states.dim() - 2), -1).repeat(1, *states.shape[1:-1], 1)


_WRITES = (Tensor.copy_, Tensor.index_copy_, Tensor.index_add_, Tensor.scatter_, Tensor.__setitem__)
"""Operations that write to an argument; repeated with copies, they would write to a copy."""


def _widened(states: Tensor) -> Tensor:
    return states.float() if states.is_floating_point() else states


def _patterns(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers [rows, width] from a separate generator."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)


def _pattern(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers [width] between -1 and 1 that do not vanish under a norm layer."""
    return torch.arange(width, device=device, dtype=torch.float32).cos().to(dtype)


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
