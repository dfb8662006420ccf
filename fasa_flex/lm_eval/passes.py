"""Forward passes for scoring: short requests in batches, long ones in parts, choices on one shared prefill.

The context's queries are dense and each query of the continuation selects its own keys
(`fasa_flex.lm_eval.windows`). The three ways to run a request differ in time and memory only:

* **side by side**: one forward over right-padded rows, the ordinary case.
* **in parts**: a long request is fed to a KV cache in parts, so that neither the activations of all its tokens nor all
  [L, V] log-probabilities exist at one time. Peak memory is the KV cache and the activations of one part.
* **on one prefill**: requests with the same long context, such as the choices of one question, prefill it once; the
  cache is cropped back between them.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import attention_shape, device_of
from fasa_flex.lm_eval.windows import Batch, Window, score
from fasa_flex.model.handle import Fasa
from fasa_flex.prefill.grid import BLOCK

Answer = tuple[float, bool]

_SHARED = 256  # tokens of shared context from which one prefill is faster than a batch
_MASK = 1 << 28  # most elements of the mask [B, L, L] that padding needs
_LOGITS = 1 << 25  # most elements of the logits that exist at one time


@dataclass(frozen=True)
class Limits:
    """Tokens of one forward, limited so that activations stay smaller than the KV cache.

    Attributes:
        whole: longest request, in tokens, that runs in one forward.
        part: tokens of one forward over a part of the context.
        rows: tokens of one forward whose queries are scored or sparse.
    """

    whole: int
    part: int
    rows: int

    @classmethod
    def of(cls, model: PreTrainedModel, whole: int = 4096) -> Limits:
        """Limits from the model's config.

        A part of p tokens needs masks and scores of p * T * 4 bytes, in a few copies (and for each query head where it
        is scored); the cache needs T * (bytes of a token).
        """
        layers, _, _, head_dim = attention_shape(model)
        shard = HeadShard.of(model)
        token = 2 * layers * shard.kv_heads * head_dim * model.dtype.itemsize
        logits = max(4, _LOGITS // model.config.get_text_config().vocab_size)
        return cls(
            whole=whole,
            part=min(4096, max(128, token // 32)),
            rows=min(512, logits, max(16, token // (64 * shard.query_heads))),
        )


class Passes:
    """Scores windows with a model under FASA.

    Args:
        model: the model.
        fasa: its handle, whose `sparse_from` sets the first sparse query.
        pad: token id of padding.
        softmax_dtype: as lm-eval's ``softmax_dtype``.
        limits: tokens of one forward; None is `Limits.of` the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fasa: Fasa,
        pad: int,
        softmax_dtype: torch.dtype | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.fasa, self.pad, self.softmax_dtype = model, fasa, pad, softmax_dtype
        self.limits = Limits.of(model) if limits is None else limits
        self.shared_prefills = 0
        self._whole = BLOCK if fasa.config.prefill == "blocks" else 1  # parts of a prefill by blocks hold whole ones
        layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self._crops = not fasa.remembers and not window and all(kind == "full_attention" for kind in layers)

    @torch.no_grad()
    def score(
        self, windows: Sequence[Window], batch_size: int, autocast: AbstractContextManager[Any]
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Score the windows, group by group.

        Args:
            windows: in any order.
            batch_size: rows of one forward.
            autocast: context of every forward; entered more than once.

        Yields:
            the indices of some windows, and their answers.
        """
        beside: list[int] = []
        for group in self._groups(windows):
            if len(group) == 1 and not self._is_long(windows[group[0]]):
                beside += group
                continue
            self.shared_prefills += len(group) > 1
            with autocast:
                yield group, self._in_parts([windows[number] for number in group])
        for batch in self._batches(beside, windows, batch_size):
            with autocast:
                yield batch, self._side_by_side([windows[number] for number in batch])

    def _is_long(self, window: Window) -> bool:
        length, scored = len(window.ids), len(window.targets)
        return length > self.limits.whole or scored * self.model.config.get_text_config().vocab_size > 4 * _LOGITS

    def _groups(self, windows: Sequence[Window]) -> list[list[int]]:
        """Indices of windows that share their dense context; longest first, so that out-of-memory comes early."""
        groups: dict[Any, list[int]] = {}
        for number, window in enumerate(windows):
            shared = self._shared(window)
            alone = not self._crops or shared < _SHARED
            key = number if alone else (shared, hashlib.sha1(array("q", window.ids[:shared]).tobytes()).digest())
            groups.setdefault(key, []).append(number)
        return sorted(groups.values(), key=lambda group: -max(len(windows[number].ids) for number in group))

    def _batches(self, numbers: list[int], windows: Sequence[Window], batch_size: int) -> Iterator[list[int]]:
        """Indices in batches, longest window first, each with a padding mask of at most `_MASK` elements."""
        ordered = sorted(numbers, key=lambda number: (-len(windows[number].ids), windows[number].ids))
        at = 0
        while at < len(ordered):
            longest = len(windows[ordered[at]].ids)
            rows = min(batch_size, max(1, _MASK // longest**2))
            yield ordered[at : at + rows]
            at += rows

    def _side_by_side(self, windows: Sequence[Window]) -> list[Answer]:
        batch = Batch.of(windows, pad=self.pad, device=device_of(self.model))
        with self.fasa.sparse_from(batch.start, batch.stop):
            logits: Tensor = self.model(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=batch.keep
            ).logits
        rows = batch.rows(logits, windows)
        return [score(row, window.targets, self.softmax_dtype) for row, window in zip(rows, windows, strict=True)]

    def _in_parts(self, windows: Sequence[Window]) -> list[Answer]:
        """Score windows with the same first ``unscored`` tokens: one prefill of these, then each window's rest."""
        shared = self._shared(windows[0])
        cache = reserved_cache(self.model, max(len(window.ids) for window in windows))
        for start, stop in parts(0, shared, self.limits.part, self._whole):
            self._forward(windows[0], start, stop, cache, keep=1)
        answers = []
        for number, window in enumerate(windows):
            answers.append(self._rest(window, shared, cache))
            if number + 1 < len(windows):
                cache.crop(shared - len(window.ids))
        return answers

    def _shared(self, window: Window) -> int:
        """Tokens of the context that are prefilled apart."""
        return window.unscored // self._whole * self._whole

    def _rest(self, window: Window, shared: int, cache: DynamicCache) -> Answer:
        total, greedy = 0.0, True
        for start, stop in parts(shared, len(window.ids), max(self.limits.rows, 2 * self._whole)):
            scored = stop - max(start, window.first)
            logits = self._forward(window, start, stop, cache, keep=max(1, scored))
            if scored > 0:
                targets = window.targets[stop - scored - window.first : stop - window.first]
                part, is_greedy = score(logits[0, -scored:], targets, self.softmax_dtype)
                total, greedy = total + part, greedy and is_greedy
        return total, greedy

    def _forward(self, window: Window, start: int, stop: int, cache: DynamicCache, keep: int) -> Tensor:
        boundary = torch.tensor([window.sparse_from], device=device_of(self.model))
        ids = torch.tensor([window.ids[start:stop]], device=device_of(self.model))
        with self.fasa.sparse_from(boundary), _grouped_heads(ids.device):
            logits: Tensor = self.model(
                input_ids=ids, use_cache=True, logits_to_keep=keep, **cache_argument(self.model, cache)
            ).logits
        return logits


class ReservedLayer(DynamicLayer):
    """A cache layer that allocates its whole length at once, so that growing neither copies nor fragments memory.

    Args:
        length: capacity in tokens.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns views of the filled part of the buffers."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = (x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key_states, value_states))
            self._buffers = keys, values
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


def reserved_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """The model's `DynamicCache`, with capacity for ``length`` tokens in every layer that keeps all tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def _grouped_heads(device: torch.device) -> Iterator[None]:
    """On CPU, stop transformers from repeating keys and values for every query head, which doubles time and memory.

    It repeats them for a CUDA kernel that supports no groups together with a mask; this variable turns that off.
    """
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    if device.type != "cpu" or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def parts(start: int, stop: int, size: int, whole: int = 1) -> Iterator[tuple[int, int]]:
    """Cut slots [start, stop) into even parts of at most ``max(size, 3)``, none of one slot unless it is the only one.

    A forward of one token counts as a decode step, which is sparse whatever the boundary is. With ``whole`` parts
    end at its multiples, and are longer by less than it.
    """
    length = stop - start
    count = -(-length // max(size, 3))
    ends = [start + length * number // count // whole * whole for number in range(1, count)]
    for begin, end in pairwise([start, *ends, stop]):
        if end > begin:
            yield begin, end
