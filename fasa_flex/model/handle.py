"""A model under FASA: what its attention does, forward by forward; `fasa_flex.model.enable.enable` makes one."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from fasa_flex.backends.dense import decodes_grouped, grouped_attention
from fasa_flex.backends.table import sparse_attention
from fasa_flex.backends.triton.dispatch import check_kernels
from fasa_flex.caches.capacity import make_room, partly_written, take_back
from fasa_flex.caches.host_layers import held_rows
from fasa_flex.caches.packed_layers import advance_state, pack_layer, packed_keys, packs
from fasa_flex.calibration.from_prompt import PromptCalibration
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.completion import Completion
from fasa_flex.core.config import Completion as CompletionKind
from fasa_flex.core.config import FasaConfig, GroupReduce
from fasa_flex.core.criteria import Criterion
from fasa_flex.core.layer_budgets import spread_budget
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks, Forward, Given, Scorer, SequenceScorer, estimates_logits
from fasa_flex.core.selection import Marks
from fasa_flex.hf.attention_routing import AttentionResult, AttentionSeam, DenseAttention, implementation_of
from fasa_flex.hf.boundary import Boundary
from fasa_flex.hf.compatibility import cache_among
from fasa_flex.hf.forward_checks import check_forward, check_keys, mask_of, softmax_of
from fasa_flex.hf.generation import generating, reads_prompt
from fasa_flex.hf.masks import DecodeStep, Once, count_valid, last_valid, valid_from_mask, valid_numbers
from fasa_flex.hf.model_structure import attention_modules, attention_shape, device_of, layer_of, maximum_positions
from fasa_flex.model.crossover import packs_late, sparse_layer_is_faster
from fasa_flex.model.stats import FasaStats, read_share, tally

_SCORE_BYTES = 1 << 27

_boundaries: ContextVar[Mapping[int, Boundary]] = ContextVar("fasa_boundaries")
"""Of `Fasa.sparse_from`, by the id of its handle: of this thread or task alone."""

_NONE: Mapping[int, Boundary] = {}


class _Forward(threading.local):
    """What a thread's forward has in common.

    Attributes:
        reads_prompt: whether a forward of one token reads the last of a prompt, and decodes nothing.
        cache: which the forward writes to.
        spoilt: the rows whose padding holds NaN, bool [B] (`check_keys`); None: none does.
        boundary: as in `_boundaries`, for Dynamo, which traces no `ContextVar`.
    """

    reads_prompt: bool = False
    cache: weakref.ref[Cache] | None = None
    spoilt: Tensor | None = None
    boundary: Boundary | None = None


class Fasa:
    """A model under FASA; made by `enable`.

    Attributes:
        config: the settings.
        dense_layers: the layers that stay dense, each with its reason.
        completion: what stands for the unselected keys: ``config.completion``, or what None comes to here.
        packed_dtype: what packed keys are held in, by its name; None: nothing is packed.
        stats: what the model did since `enable` or ``stats.reset()``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FasaConfig,
        scorers: dict[int, Scorer | SequenceScorer],
        dense: dict[int, str],
        source: FasaProfile | PromptCalibration | None,
    ) -> None:
        self.config = config
        self.dense_layers = dense
        self._source = source
        self._scorers = {} if isinstance(source, PromptCalibration) else scorers
        # told apart once: whether an object has a protocol takes as long as a layer's other Python
        self._followers = {layer: s for layer, s in self._scorers.items() if isinstance(s, SequenceScorer)}
        self._reduce: GroupReduce = "none" if config.per == "query_head" else config.group_reduce
        self._budget = config.budget
        self._budgets = spread_budget(
            self._budget, config.layer_budgets, sorted(scorers), kv_heads=attention_shape(model)[2]
        )
        self.completion = _completion_of(config, self._scorers or scorers)
        self._packs = packs(model) and config.per == "kv_head"
        self.packed_dtype = _packed_dtype_of(model, scorers) if self._packs else None
        self._limit = maximum_positions(model)
        self._forward, self._threads = _Forward(), set[int]()
        self._step = DecodeStep()
        modules = attention_modules(model)
        self._first = min(modules)
        self.stats = FasaStats(
            [device_of(modules.get(layer, model), model) for layer in range(max(modules) + 1)],
            {layer: read_share(each, model, config, self._packs, self.completion) for layer, each in scorers.items()},
            {layer: budget.heads for layer, budget in self._budgets.items()},
            lambda: self.settings,
        )
        if config.backend == "triton":
            _, heads, kv_heads, _ = attention_shape(model)
            for layer, known in scorers.items():
                device, budget = device_of(modules[layer], model), self._budgets[layer]
                check_kernels(device, layer, known, budget, config, self._packs, heads // kv_heads)
        self._model_name = type(model).__name__
        self._seam = AttentionSeam(model, self._attend, owner=f"the open handle {self!r}")
        self._former = {layer: implementation_of(model, module) for layer, module in modules.items()}
        self._hooks = [
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True) for module in modules.values()
        ]
        self._seam.open()  # last: another thread may be in a forward, and comes here from now on

    @property
    def remembers(self) -> bool:
        """Whether the method goes by earlier queries, so that a cropped or shared cache cannot be continued."""
        return any(getattr(scorer, "remembers", True) for scorer in self._followers.values())

    @property
    def profile(self) -> FasaProfile | None:
        """What `enable` was given, or what the model found in a prompt; None before it has, and for another method."""
        return self._source.profile if isinstance(self._source, PromptCalibration) else self._source

    @property
    def criterion(self) -> Criterion | None:
        """What the profile chose the chunks by; None before there is one, and for another method."""
        chunks = isinstance(next(iter(self._scorers.values()), None), DominantChunks)
        profile = self.profile if chunks or isinstance(self._source, PromptCalibration) else None
        return None if profile is None else profile.criterion(self.config.criterion)

    @property
    def settings(self) -> dict[str, str | None]:
        """Which criterion, packed dtype and completion run, where the config says None, too."""
        return {name: getattr(self, name) for name in ("criterion", "packed_dtype", "completion")}

    def recalibrate(self) -> None:
        """Forget what was found in a prompt: all is dense until the next long one.

        Raises:
            ValueError: `enable` was given a profile or a scorer.
        """
        if not isinstance(self._source, PromptCalibration):
            raise ValueError("enable was given a profile or a scorer; only enable(model) calibrates on prompts.")
        self._source.forget()

    def disable(self) -> None:
        """Give the model its former attention back; its outputs are then bit-identical to those before `enable`.

        An answer that another thread generates meanwhile is dense from here on: a warning says so, and
        ``stats.interrupted`` counts it.
        """
        if self._seam.is_open:
            interrupted = generating(self._threads - {threading.get_ident()})
            if interrupted:
                self.stats.interrupted += interrupted
                several = "s generate, whose answers are" if interrupted > 1 else " generates, whose answer is"
                warnings.warn(
                    f"{self!r} is disabled while {interrupted} other thread{several} dense from here on; "
                    "wait for generation to end first.",
                    stacklevel=2,
                )
        self._seam.close()
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"Fasa({self._model_name}, n_fac={self.config.n_fac}, {settings})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Fasa:
        """A copied model would go on counting and attending through this handle.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be copied; disable() first, and enable the copy by itself.")

    def __reduce__(self) -> str:
        """A pickled model would be one without its handle.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under FASA cannot be pickled; disable() first, or use its save_pretrained.")

    def __enter__(self) -> Fasa:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @contextmanager
    def sparse_from(self, start: Tensor, stop: Tensor | None = None) -> Iterator[None]:
        """Evaluate with an explicit boundary: one forward equal to token-by-token sparse decode.

        It concerns forwards of one token and of several, in this thread alone. Slots count from the first key of the
        cache, padding included.

        Args:
            start: int64 [B] or [1]: queries of row b at slots >= start[b] select for themselves, earlier ones are
                dense.
            stop: int64, shaped as ``start``: queries at slots >= stop[b] are padding and are not counted.

        Raises:
            ValueError: boundaries of another shape, type or batch, or negative ones.
        """
        self._check_open()
        boundary, former = Boundary.of(start, stop), self._forward.boundary
        token = _boundaries.set({**_boundaries.get(_NONE), id(self): boundary})
        self._forward.boundary = boundary
        try:
            yield
        finally:
            self._forward.boundary = former
            _boundaries.reset(token)

    @property
    def _boundary(self) -> Boundary | None:
        return self._forward.boundary if torch.compiler.is_compiling() else _boundaries.get(_NONE).get(id(self))

    @property
    def _reads_prompt(self) -> bool:
        return not torch.compiler.is_compiling() and self._forward.reads_prompt

    def _scorer(self, layer: int) -> Scorer | SequenceScorer | None:
        """The scorer of a layer; None where it is dense, or not calibrated yet."""
        if not isinstance(self._source, PromptCalibration):
            return self._scorers.get(layer)
        return self._source.scorer(layer) if layer in self._budgets else None

    def _check_open(self) -> None:
        if not self._seam.is_open:
            raise ValueError(f"{self!r} was disabled, so the model is dense; call enable(...) again for a new handle.")

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand on to the attention function what transformers keeps from it: the cache, and where the queries begin."""
        cache = cache_among(kwargs)
        layer = layer_of(module)
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if layer == self._first:  # before any layer of the cache is written to
            self._seam.check()
            if not torch.compiler.is_compiling():
                self._threads.add(threading.get_ident())
                self._forward.reads_prompt = states.shape[1] == 1 and reads_prompt()
                self._forward.cache = None if cache is None else weakref.ref(cache)
                self._forward.spoilt = None
            check_forward(len(states), states.shape[1], cache, layer, kwargs, self._boundary, self._limit)
            if cache is not None:
                make_room(cache, states.shape[1])
        if cache is not None and layer in self._budgets and self._packs:
            self._pack(cache, layer, states.device)
            kwargs = {**kwargs, "fasa_cache": cache}
        asked = self._boundary is not None or layer in self._followers
        if cache is not None and asked:  # a sliding cache holds fewer keys than there were slots, a static one more
            kwargs = {**kwargs, "fasa_first_slot": int(cache.get_seq_length(layer))}
        return args, kwargs

    def _pack(self, cache: Cache, layer: int, device: torch.device) -> None:
        """Pack a layer's keys, those of a growing one at its first sparse step where "fastest" is better off so."""
        late = self.config.backend == "fastest" and packs_late(device)
        pack_layer(cache, layer, self._scorer(layer), growing=not late)

    def _attend(
        self,
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionResult:
        """The attention function: [B, Q, Hq, D] from query [B, Hq, Q, D] and the whole cache's key and value.

        Where it refuses, the cache is as before the forward, or the error says that it is not.
        """
        if torch.compiler.is_compiling():
            return self._attended(dense, module, query, key, value, attention_mask, **kwargs)
        try:
            return self._attended(dense, module, query, key, value, attention_mask, **kwargs)
        except ValueError as error:
            cache, layer = self._forward.cache and self._forward.cache(), layer_of(module)
            if cache is None or take_back(cache, layer, query.shape[2]):
                raise
            raise partly_written(error, layer) from error

    def _attended(
        self,
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionResult:
        """What `_attend` does."""
        cache: Cache | None = kwargs.pop("fasa_cache", None)
        layer = layer_of(module)
        batch, _, q_len, _ = query.shape
        kv_len = key.shape[2]
        first_slot: int = kwargs.pop("fasa_first_slot", kv_len - q_len)
        softmax = softmax_of(module, query, kwargs, self._former[layer])
        seen = mask_of(module, attention_mask, kwargs, self._former[layer], (q_len, kv_len), query.device)
        once = self._step.of(seen, (batch, q_len, kv_len), query.device, begins=layer == self._first)
        n_valid = once("n_valid", count_valid)
        if q_len > 1 and not torch.compiler.is_compiling():
            spoilt, begins = self._forward.spoilt, layer == self._first
            self._forward.spoilt = check_keys(layer, key, q_len, seen, spoilt, begins)
        self._calibrate(layer, query, key, seen, n_valid, first_slot, cache, softmax.scaling)
        scorer: Any = self._scorer(layer)
        boundary = self._boundary
        first, chosen = (q_len, None)
        if scorer is not None:
            first, chosen = self._sparse_queries(layer, once, n_valid, kv_len, first_slot, boundary)
        completion = self._completed(layer, cache, query, key, value, once, scorer)
        groups = self._groups(layer, kv_len, kwargs) and decodes_grouped(query, key, value, attention_mask, softmax)
        if self.config.backend == "fastest" and chosen is not None:
            states = (query, key, value)
            if not sparse_layer_is_faster(cache, layer, *states, self._budgets[layer].widest(kv_len), groups):
                first, chosen = q_len, None
        self._count(layer, once, n_valid, chosen, first_slot)
        if layer in self._followers:
            valid = once("valid", valid_from_mask)
            sparse = torch.zeros_like(n_valid, dtype=torch.bool) if chosen is None else chosen
            whole = self._forward.cache and self._forward.cache()
            budget = self._budgets[layer]
            forward = Forward(query, key, valid, sparse, first, first_slot, budget, softmax.scaling, whole)
            scorer = Given(self._followers[layer].follow(forward))
        if chosen is None:  # keys and values of FASA-M may be the host's
            key, value = key.to(query.device), value.to(query.device)
            if groups:
                valid = once("valid", valid_from_mask)
                out = grouped_attention(query, key, value, valid, softmax, all_valid=attention_mask is None)
                return out.transpose(1, 2).contiguous(), None
            return dense(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError(f"{type(module).__name__} uses dropout, sparse attention does not; call model.eval().")
        assert scorer is not None
        valid = once("valid", valid_from_mask)[:, :, :, first:]
        packed = held = None
        if cache is not None and q_len == 1:
            packed, held = packed_keys(cache, layer, scorer), held_rows(cache, layer)
            if packed is None and self._packs:  # its first sparse step
                pack_layer(cache, layer, scorer)
                packed = packed_keys(cache, layer, scorer)
        marks = None
        if q_len == 1:
            budget = self._budgets[layer]
            samples = self._reduce == "softmax" or completion is not None
            marks = once(("marks", budget), lambda *_: Marks.of(valid, budget, samples))
        states = (query[:, :, first:], key, value)
        call = Call(
            *states, scorer, valid, self._budgets[layer], self._reduce, softmax, packed, held, marks, completion
        )
        focused = self._focused(call)
        weights = None
        if kwargs.get("output_attentions") and self._former[layer] == "eager":
            weights = self._weights(call)
        if boundary is None or boundary.highest <= first_slot:  # every query is sparse
            return focused, weights
        out, dense_weights = dense(module, query, key, value, attention_mask, **kwargs)
        merged = torch.where(chosen[:, first:, None, None], focused, out[:, first:])
        out = torch.cat([out[:, :first], merged], dim=1)
        if weights is None or dense_weights is None:
            return out, dense_weights
        merged = torch.where(chosen[:, None, first:, None], weights, dense_weights[:, :, first:])
        return out, torch.cat([dense_weights[:, :, :first], merged], dim=2)

    def _calibrate(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        n_valid: Tensor,
        first_slot: int,
        cache: Any,
        scaling: float,
    ) -> None:
        """Take a layer's scorer from the dense queries of a long prompt, and pack the keys that the layer holds."""
        if not isinstance(self._source, PromptCalibration) or self._source.profile is not None:
            return
        if layer == self._first:
            self._source.begin()
        boundary, device, q_len = self._boundary, n_valid.device, n_valid.shape[1]
        if boundary is not None and first_slot + q_len + 1 < boundary.lowest:
            return  # a part of a prompt, and not the last (but for a token that may come with its continuation)
        sparse = None if boundary is None else boundary.behind(first_slot, q_len, device)
        if self._forward.spoilt is not None:  # rows of NaN agree with nothing
            spoilt = self._forward.spoilt.to(device)[:, None].expand(-1, q_len)
            sparse = spoilt if sparse is None else sparse | spoilt
        measured = self._source.measure(layer, query, key, mask, n_valid, sparse, scaling)
        if measured and layer in self._budgets and cache is not None:
            self._pack(cache, layer, device)

    def _completed(
        self, layer: int, cache: Cache | None, query: Tensor, key: Tensor, value: Tensor, once: Once, scorer: object
    ) -> Completion | None:
        """How a layer's sparse queries are completed, after its state is brought up to date; None: they are not."""
        if self.completion == "none" or scorer is None:
            return None
        strength = self.config.completion_strength if self.completion == "first_order" else 0.0
        counted = (once("last_valid", last_valid), once("number", valid_numbers), query.shape[2])
        state = advance_state(cache, layer, scorer, key, value, strength != 0.0, *counted)
        by_all = getattr(scorer, "completes_by_all", False)
        return Completion(strength, state if query.shape[2] == 1 else None, by_all)

    def _sparse_queries(
        self, layer: int, once: Once, n_valid: Tensor, kv_len: int, first_slot: int, boundary: Boundary | None
    ) -> tuple[int, Tensor | None]:
        """Which queries of a forward are sparse: the first row that may be (Q for none), and bool [B, Q] for all."""
        q_len, budget = n_valid.shape[1], self._budgets[layer]
        if budget.covers(kv_len):
            return q_len, None
        over_budget = once(("over", budget), lambda *_: budget.exceeded(n_valid))
        if boundary is None:
            decodes = q_len == 1 and not self._reads_prompt
            return (0, over_budget) if decodes or self.config.prefill == "sparse" else (q_len, None)
        behind = boundary.behind(first_slot, q_len, n_valid.device)
        first = max(0, boundary.lowest - first_slot)
        return (first, over_budget & behind) if first < q_len else (q_len, None)

    def _groups(self, layer: int, kv_len: int, options: dict[str, Any]) -> bool:
        """Whether a dense layer may attend by ours instead of the model's own attention; not bit by bit the same."""
        ours = layer in self.dense_layers or self.config.backend == "fastest"
        asked_more = options.get("dropout") or options.get("output_attentions")
        return ours and not asked_more and not self._budget.covers(kv_len)

    def _focused(self, call: Call) -> Tensor:
        """Sparse attention of every query, [B, Q, Hq, D], as many queries at a time as their scores fit in memory."""
        q_len, backend = call.query.shape[2], self.config.backend
        if q_len == 1:  # a graph would be guarded on T, token by token
            return sparse_attention(call, backend).transpose(1, 2).contiguous()
        step = max(1, _SCORE_BYTES // 8 // call.query.shape[0] // call.query.shape[1] // call.key.shape[2])
        scores = call.scorer.scores if isinstance(call.scorer, Given) else None
        parts = []
        for at in range(0, q_len, step):
            part = replace(call, query=call.query[:, :, at : at + step], valid=call.valid[:, :, :, at : at + step])
            if scores is not None:
                part.scorer = Given(scores[..., at : at + step, :])
            parts.append(sparse_attention(part, backend))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2).contiguous()

    def _weights(self, call: Call) -> Tensor:
        """Attention weights [B, Hq, Q, T] of sparse queries, for ``output_attentions``: values of 1 at one key each."""
        key = call.key.to(call.query.device)
        ones = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
        alone = replace(call, key=key, value=ones, packed_keys=None, held=None, marks=None, completion=None)
        return sparse_attention(alone, "gather")

    def _count(self, layer: int, once: Once, n_valid: Tensor, chosen: Tensor | None, first_slot: int) -> None:
        budget = self._budgets.get(layer, self._budget)
        counted = None
        if (boundary := self._boundary) is not None:
            counted = boundary.counted(first_slot, n_valid.shape[1], n_valid.device)
        if counted is not None:
            self.stats.add(layer, tally(n_valid * counted, chosen, budget))
        else:
            self.stats.add(layer, once((chosen is None, budget), lambda *_: tally(n_valid, chosen, budget)))


def _packed_dtype_of(model: PreTrainedModel, scorers: dict[int, Scorer | SequenceScorer]) -> str | None:
    """What the keys of the sparse layers are packed in; None: their scorers score no dimensions of keys."""
    for scorer in scorers.values():
        if isinstance(scorer, DominantChunks):
            return scorer.dtype or str(model.dtype).removeprefix("torch.")
    return None


def _completion_of(config: FasaConfig, scorers: dict[int, Scorer | SequenceScorer]) -> CompletionKind:
    """``config.completion``, by what the scorers of the sparse layers say.

    Raises:
        ValueError: it is asked for and their scores are no logits.
    """
    able = all(map(estimates_logits, scorers.values()))
    if config.completion in ("first_order", "mean") and not able:
        other = next(type(scorer).__name__ for scorer in scorers.values() if not estimates_logits(scorer))
        raise ValueError(
            f"completion={config.completion!r} needs scores that estimate logits, which {other} does not give; "
            "use completion=None or 'none'."
        )
    # without one chunk set per key/value head no layer keeps a state, and a step would read every key and value for it
    keeps = all(isinstance(scorer, DominantChunks) for scorer in scorers.values()) and config.per == "kv_head"
    return config.completion or ("first_order" if keeps else "none")
