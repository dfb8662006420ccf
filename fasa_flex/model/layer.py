"""One attention layer of a model under FASA: chooses the sparse queries and computes their attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from fasa_flex.backends.dense import decodes_grouped, grouped_attention
from fasa_flex.backends.table import sparse_attention
from fasa_flex.caches.capacity import partly_written, slots_written, take_back
from fasa_flex.caches.host_layers import OnHost
from fasa_flex.caches.keeps_packed_keys import KeepsPackedKeys
from fasa_flex.caches.packing import pack_layer
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks, Forward, Given, Scorer, SequenceScorer
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult, cache_among
from fasa_flex.hf.continuous_batching import PAGED
from fasa_flex.hf.forward_checks import check_keys
from fasa_flex.model.block_prefill import BlockPrefill
from fasa_flex.model.crossover import packs_late, sparse_is_faster
from fasa_flex.model.paged_layer import PagedLayer
from fasa_flex.model.several_queries import in_parts, merged, weights_of
from fasa_flex.model.shared import OfOneModel, Shared
from fasa_flex.model.stats import tally
from fasa_flex.model.visible import Visible


class Layer(OfOneModel):
    """One attention layer.

    Args:
        number: number of the layer, from 0.
        begins: whether it is the model's first attention layer.
        implementation: name of the model's own attention in transformers, such as "sdpa".
        shared: objects that all layers share.
        scorer: ranks the keys; None: the layer stays dense, or is not calibrated yet.
        budget: number of keys that a sparse query attends to; None: the layer stays dense.

    Attributes:
        follower: the scorer if it is a `SequenceScorer`, which runs in every forward; otherwise None.
    """

    def __init__(
        self,
        number: int,
        begins: bool,
        implementation: str,
        shared: Shared,
        scorer: Scorer | None,
        budget: Budget | None,
    ) -> None:
        config = shared.config
        self.number, self.begins, self.implementation = number, begins, implementation
        self.budget, self._scorer, self._source = budget, scorer, shared.source
        self.follower = scorer if isinstance(scorer, SequenceScorer) else None
        self._forwards, self._stats = shared.forwards, shared.stats
        self._packs = shared.packs and budget is not None
        self._backend, self._prefill, self._group_reduce = config.backend, config.prefill, shared.group_reduce
        self._completes, self._strength, self._samples = shared.completes, shared.strength, shared.samples
        self._by_all = scorer is not None and scorer.completes_by_all
        self._dense_budget = config.budget  # up to this many keys a dense layer runs the model's own attention
        self._may_group = budget is None or config.backend == "fastest"
        self._paged = PagedLayer(number, begins, implementation, shared, budget, lambda: self.scorer)
        own = (number, config, shared.estimator, implementation == "eager")
        by_blocks = config.prefill == "blocks" and budget is not None
        self._blocks = BlockPrefill(*own, shared.forwards, shared.stats) if by_blocks else None

    @property
    def scorer(self) -> Scorer | None:
        """The scorer; None if the layer is dense or not calibrated yet."""
        if self._source is None:
            return self._scorer
        return None if self.budget is None else self._source.scorer(self.number)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook before the attention module: begin the forward in the first layer, and let the cache pack keys.

        The module passes its keyword arguments to the attention function, except for the cache; the hook adds it.
        """
        if PAGED in kwargs:
            return self._paged.before(args, kwargs)
        number, forwards, cache = self.number, self._forwards, cache_among(kwargs)
        if self.begins:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            forwards.begin(len(states), states.shape[1], cache, number, kwargs)
        if cache is None:
            return None
        compiling = torch.compiler.is_compiling()
        if self._packs and not compiling:
            scorer = self._scorer if self._source is None else self.scorer
            cached = cache.layers[number] if number < len(cache.layers) else None
            if scorer is not None and getattr(cached, "scorer", None) is not scorer:
                self._pack(cache, scorer, (args[0] if args else kwargs["hidden_states"]).device)
        boundary = forwards.now.traced_boundary if compiling else forwards.now.boundary
        first_slot = None
        if boundary is not None or self.follower is not None:
            # not kv_len - q_len: sliding caches have dropped slots, static caches have unused ones
            first_slot = slots_written(cache, number)
        return args, {**kwargs, "fasa_cache": (cache, first_slot)}

    def attend(self, call: AttentionCall) -> AttentionResult:
        """Compute attention [B, Q, Hq, D] of a call.

        Raises:
            ValueError: the input is refused; the cache is as before the forward unless the message says otherwise.
        """
        if PAGED in call.options:
            return self._paged.attend(call)
        cache, first_slot = call.options.pop("fasa_cache", (None, None))
        if torch.compiler.is_compiling():
            return self._attend(call, cache, first_slot)
        try:
            return self._attend(call, cache, first_slot)
        except ValueError as error:
            if cache is None or take_back(cache, self.number, call.query.shape[2]):
                raise
            raise partly_written(error, self.number) from error

    def _attend(self, call: AttentionCall, cache: Cache | None, first_slot: int | None) -> AttentionResult:
        """Choose the sparse queries, count them, and compute attention."""
        number, now, budget = self.number, self._forwards.now, self.budget
        query, key, value = call.query, call.key, call.value
        q_len, kv_len, compiling = query.shape[2], key.shape[2], torch.compiler.is_compiling()
        boundary = now.traced_boundary if compiling else now.boundary
        first_slot = kv_len - q_len if first_slot is None else first_slot
        softmax = call.softmax(self.implementation)
        mask = call.mask_of_several(self.implementation) if q_len > 1 else call.mask
        visible = self._forwards.visible(mask, (len(query), q_len, kv_len), query.device, self.begins)
        measured = q_len > 1 and self._read_prompt(call, visible, cache, first_slot)
        scorer = self._scorer if self._source is None else self.scorer
        state = cached = sparse = marks = None
        first, counts = q_len, visible.dense_counts
        if scorer is not None and budget is not None:
            cached = cache.layers[number] if cache is not None and number < len(cache.layers) else None
            if not isinstance(cached, KeepsPackedKeys) or cached.scorer is not scorer:
                cached = None  # it has no packed keys of this scorer
            if self._completes:
                state = cached and cached.advance(key, value, self._strength != 0.0, *visible.last(), q_len)
            if q_len == 1 and boundary is None:
                if compiling or not now.reads_prompt or self._prefill == "sparse":
                    sparse, marks, counts = visible.decoding(budget, self._samples)
                    first = q_len if sparse is None else 0
            else:
                first, sparse = self._sparse_queries(visible, first_slot)
        if sparse is not None and self._backend == "fastest" and not self._is_faster(cache, call, softmax):
            first, sparse, counts = q_len, None, visible.dense_counts
        if boundary is not None or (sparse is not None and marks is None):
            counts = self._counts(visible, sparse, first_slot)
        self._stats.add(number, counts)
        prefills, run_dense = q_len > 1 or (not compiling and now.reads_prompt), call.run_dense
        if self._blocks and isinstance(scorer, DominantChunks) and prefills and not measured:
            run_dense = functools.partial(self._blocks.attend, call, scorer, visible, sparse, first_slot, softmax)
        if self.follower is not None and budget is not None:
            chosen = torch.zeros_like(visible.n_valid, dtype=torch.bool) if sparse is None else sparse
            inputs = (query, key, visible.valid(), chosen, first, first_slot, budget, softmax.scaling, cache)
            scorer = Given(self.follower.follow(Forward(*inputs)))
        if sparse is None:
            return self._grouped(call, visible, softmax) if self._groups(call, softmax) else run_dense()
        if call.options.get("dropout"):
            raise call.no_dropout()
        assert budget is not None
        assert scorer is not None
        packed = resident = completion = None
        if q_len == 1:
            if cached is None and cache is not None and self._packs:  # the first sparse step packs
                cached = pack_layer(cache, number, scorer)
                if self._completes:
                    state = cached and cached.advance(key, value, self._strength != 0.0, *visible.last(), q_len)
            packed = None if cached is None else cached.packed
            resident = cached.own_resident() if isinstance(cached, OnHost) else None
        if self._completes:
            completion = Completion(self._strength, state if q_len == 1 else None, self._by_all)
        part = query if first == 0 else query[:, :, first:]  # others' scores are `Given`
        states = (part, key, value, scorer, visible.valid()[:, :, :, first:], budget, self._group_reduce, softmax)
        sparse_call = Call(*states, packed, resident, marks, completion)
        if q_len == 1:  # splitting many queries would guard a compiled graph on T and recompile for every token
            focused = sparse_attention(sparse_call, self._backend).transpose(1, 2).contiguous()
        else:
            focused = in_parts(sparse_call, self._backend)
        returns_weights = call.options.get("output_attentions") and self.implementation == "eager"
        weights = weights_of(sparse_call) if returns_weights else None
        if boundary is None or boundary.highest <= first_slot:  # every query is sparse
            return focused, weights
        return merged(run_dense(), focused, weights, sparse, first)

    def _pack(self, cache: Cache, scorer: Scorer | None, device: torch.device) -> None:
        """Let the cache pack this layer's keys; with "fastest" on a GPU a growing cache waits for a sparse step."""
        pack_layer(cache, self.number, scorer, growing=self._backend != "fastest" or not packs_late(device))

    def _read_prompt(self, call: AttentionCall, visible: Visible, cache: Cache | None, first_slot: int) -> bool:
        """Refuse NaN keys in a forward of several tokens; calibrate on them if there is no profile; return whether."""
        now, query, key, q_len = self._forwards.now, call.query, call.key, call.query.shape[2]
        if not torch.compiler.is_compiling():
            now.nan_rows = check_keys(self.number, key, q_len, visible.mask, now.nan_rows, self.begins)
        source, boundary = self._source, self._forwards.boundary
        if source is None or source.profile is not None:
            return False
        if self.begins:
            source.begin()
        if boundary is not None and first_slot + q_len + 1 < boundary.lowest:
            return False  # not the last chunk of the prompt; + 1: the last prompt token may come with the continuation
        sparse = None if boundary is None else boundary.behind(first_slot, q_len, visible.device)
        if now.nan_rows is not None:  # batch rows with NaN cannot be measured
            excluded = now.nan_rows.to(visible.device)[:, None].expand(-1, q_len)
            sparse = excluded if sparse is None else sparse | excluded
        measured = source.measure(self.number, query, key, visible.mask, visible.n_valid, sparse, call.scaling)
        if measured and self._packs and cache is not None:
            self._pack(cache, self.scorer, query.device)
        return measured

    def _sparse_queries(self, visible: Visible, first_slot: int) -> tuple[int, Tensor | None]:
        """Find the sparse queries of a forward of several tokens, or with a boundary.

        Returns:
            index of the first query that may be sparse, Q for none; and the sparse queries, bool [B, Q], None for none.
        """
        budget, boundary, q_len = self.budget, self._forwards.boundary, visible.shape[1]
        assert budget is not None
        if budget.covers(visible.shape[2]) or (boundary is None and self._prefill != "sparse"):
            return q_len, None
        over = budget.exceeded(visible.n_valid)
        if boundary is None:
            return 0, over
        first = max(0, boundary.lowest - first_slot)
        behind = boundary.behind(first_slot, q_len, visible.device)
        return (first, over & behind) if first < q_len else (q_len, None)

    def _counts(self, visible: Visible, sparse: Tensor | None, first_slot: int) -> Tensor:
        """Compute the `tally` of a forward of several tokens, or with a boundary."""
        n_valid, boundary = visible.n_valid, self._forwards.boundary
        counted = None if boundary is None else boundary.counted(first_slot, n_valid.shape[1], n_valid.device)
        return tally(n_valid if counted is None else n_valid * counted, sparse, self.budget)

    def _is_faster(self, cache: Cache | None, call: AttentionCall, softmax: Softmax) -> bool:
        """Whether sparse attention is faster: always if keys are in host memory, else by `sparse_is_faster`."""
        assert self.budget is not None
        cached = cache and cache.layers[self.number]
        if isinstance(cached, OnHost):
            return True
        growing = isinstance(cached, DynamicLayer) and not torch.compiler.is_compiling()
        width = self.budget.widest(call.key.shape[2])
        return sparse_is_faster(call.query, call.key, call.value, width, self._groups(call, softmax), growing)

    def _groups(self, call: AttentionCall, softmax: Softmax) -> bool:
        """Whether a dense layer runs `grouped_attention`, which equals the model's own within rounding."""
        more = call.options.get("dropout") or call.options.get("output_attentions")
        if not self._may_group or more or self._dense_budget.covers(call.key.shape[2]):
            return False
        return decodes_grouped(call.query, call.key, call.value, call.mask, softmax)

    def _grouped(self, call: AttentionCall, visible: Visible, softmax: Softmax) -> AttentionResult:
        """Compute dense attention of one query per row, which reads each key once per group."""
        states = (call.query, call.key, call.value)
        out = grouped_attention(*states, visible.valid(), softmax, all_valid=call.mask is None)
        return out.transpose(1, 2).contiguous(), None
