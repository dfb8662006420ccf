"""The cache of a `generate` whose caller names none: static, so that transformers compiles, where this saves time."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMode

from fasa_flex.hf.compatibility import CACHE_NAMES, cache_argument
from fasa_flex.hf.generation import calling_generate, evaluates
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.model.forwards import Forwards
from fasa_flex.model.shared import OfOneModel

WAITING = "cuda"
"""Type of the devices that wait for Python in an uncompiled decode step."""

BREAK_EVEN = 2400
"""Decode steps that save as much time as compiling takes, at the most.

On an H100 with 8 layers at 32k tokens a step takes 11.2 ms on a growing cache and 3.6 ms on a static one. Between the
two groups of rows in evals/results/generate_cuda.json 74 s passed, 19 of them for the tokens. The other 55 compiled
three models and read their prompts: at most 18.4 s a model, or 2400 steps of 7.6 ms. Both times grow with the layers.
"""

MANY = 256
"""Tokens of an answer from which a growing cache is worth a warning."""

_PREPARE = "_prepare_cache_for_generation"


class DecodeCache(OfOneModel):
    """Chooses the cache of a model's `generate`, from `open` until `close`.

    It stands in for one method of the model object, which `generate` calls to make the cache when all of its settings
    are merged. There it sees whether the caller named a cache, and it changes nothing else.

    The first static cache of a batch size compiles, and one of another length does so again, for all lengths. Either is
    chosen if the steps that have waited for Python since the last choice and the longest possible answer together are
    `BREAK_EVEN` or more: compiling is to take no longer than the waiting that went before it or that it spares.

    Args:
        model: the model.
        forwards: counts the steps that waited for Python, and knows of `Fasa.sparse_from`.
        compiles: whether there are sparse layers, and their attention is known to be traced into one graph.
        shortest: returns the tokens of a prompt from which the layers are sparse. Transformers' own attention would
            repeat all slots of a static cache for every query head.
    """

    def __init__(self, model: PreTrainedModel, forwards: Forwards, compiles: bool, shortest: Callable[[], int]) -> None:
        kind = type(model)
        own = getattr(kind, _PREPARE, None) is not GenerationMixin._prepare_cache_for_generation
        self._serves = compiles and not own and kind._can_compile_fullgraph and kind._supports_default_dynamic_cache()
        self._model, self._forwards, self._shortest = weakref.ref(model), forwards, shortest
        self._shapes: list[tuple[int, int]] = []
        self._paid, self._warned = 0, False

    def open(self) -> None:
        """Choose caches from now on, if any of the model may be static and nobody else chooses them."""
        model = self._model()
        if self._serves and model is not None and _PREPARE not in vars(model):
            setattr(model, _PREPARE, self)

    def close(self) -> None:
        """Leave the choice to transformers again; a second call does nothing."""
        model = self._model()
        if model is not None and vars(model).get(_PREPARE) is self:
            delattr(model, _PREPARE)

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Add a cache to ``model_kwargs``, as the method of transformers does in whose place it is called."""
        model = self._model()
        assert model is not None
        cache, frame = None, calling_generate()
        if frame is not None and self._free(model, generation_config, model_kwargs, generation_mode, frame):
            rows = batch_size * (generation_config.num_return_sequences or 1)
            tokens = generation_config.max_length - frame.f_locals["input_ids_length"]
            if max_cache_length + 1 - tokens >= self._shortest():
                cache = self._static(model, generation_config, rows, max_cache_length, tokens)
        if cache is None:
            prepare = GenerationMixin._prepare_cache_for_generation
            prepare(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        else:
            model_kwargs.update(cache_argument(model, cache))

    def _free(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mode: GenerationMode,
        frame: FrameType,
    ) -> bool:
        """Whether the choice is free: the caller names no cache, does not get it back, and evaluates nothing.

        Beams reorder the cache, and a draft model's candidates are not decoded in steps of equal shapes. A step on CUDA
        graphs overwrites the hidden states of the one before.
        """
        if model.device.type != WAITING or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        named = (config.cache_implementation, config.cache_config, config.max_cache_len, config.prefill_chunk_size)
        if any(name is not None for name in named) or any(model_kwargs.get(name) is not None for name in CACHE_NAMES):
            return False
        returned = config.return_dict_in_generate or config.output_attentions or config.output_hidden_states
        if (
            returned
            or config.use_cache is False
            or config.is_assistant
            or self._forwards.now.traced_boundary is not None
        ):
            return False
        return not evaluates(frame) and frame.f_locals.get("custom_generate") is None and _runs_alone(model)

    def _static(
        self, model: PreTrainedModel, config: GenerationConfig, rows: int, needed: int, tokens: int
    ) -> Cache | None:
        """Make a static cache for ``rows`` of ``needed`` slots, if compiling pays, transformers does, and it fits."""
        lengths = sorted(slots for of, slots in self._shapes if of == rows)
        held = next((slots for slots in lengths if needed <= slots <= 2 * needed), None)
        waited = self._forwards.waited
        pays = held is not None or len(lengths) > 1 or waited - self._paid + tokens >= BREAK_EVEN
        if not pays and (tokens < MANY or self._warned):
            return None
        slots = held or _rounded(needed)
        cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=slots)
        if not _compiles(model, config, cache) or _bytes(model, cache, rows) > free_bytes(model.device) // 2:
            return None
        if not pays:
            self._warn(
                f"generate decodes up to {tokens} tokens on a cache that grows, where each token waits for Python; "
                f"from {BREAK_EVEN} tokens on, earlier ones counted, it takes a static one, which transformers then "
                'compiles; pass cache_implementation="static" for that now, or "dynamic" for the cache that grows.'
            )
            return None
        if not self._shapes:
            self._warn(
                f"generate decodes up to {tokens} tokens on a static cache of {slots} slots, which transformers "
                'compiles at the first call; pass cache_implementation="dynamic" for the cache that grows.'
            )
        if held is None:
            self._shapes.append((rows, slots))
            self._paid = waited
        return cache

    def _warn(self, message: str) -> None:
        """Warn the caller of `generate`, and do not advise a static cache from now on."""
        self._warned = True
        warnings.warn(message, stacklevel=4)  # the line of `generate`


def _rounded(length: int) -> int:
    """Slots of a static cache for ``length`` tokens: up to a quarter more, so that few lengths are compiled."""
    step = max(128, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _runs_alone(model: PreTrainedModel) -> bool:
    """Whether the model lies on one device in one process, and one thread runs it, uncompiled.

    Hooks of accelerate, which move weights, and a forward that the user compiled are attributes of a module's own.
    Other threads may run the model at the same time, and compiled steps share their CUDA graphs' memory.
    """
    if model.training or threading.current_thread() is not threading.main_thread():
        return False
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return False
    if any("forward" in vars(module) or module._compiled_call_impl is not None for module in model.modules()):
        return False
    return len({parameter.device for parameter in model.parameters()}) == 1


def _compiles(model: PreTrainedModel, config: GenerationConfig, cache: Cache) -> bool:
    """Whether transformers will compile the steps on ``cache``, which has keys and values in all layers."""
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return False
    if not model._valid_auto_compile_criteria(cache_argument(model, cache), config):
        return False
    return bool(model.get_compiled_call(config.compile_config) != model.__call__)  # Llama 4's is not compiled


def _bytes(model: PreTrainedModel, cache: Cache, rows: int) -> int:
    """Size of a static cache's keys and values."""
    _, _, kv_heads, head_dim = attention_shape(model)
    slots = sum(layer.max_cache_len for layer in cache.layers)
    return int(slots * rows * 2 * kv_heads * head_dim * model.dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that this process can allocate."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
