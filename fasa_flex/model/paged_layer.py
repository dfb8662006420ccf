"""One attention layer under continuous batching: decoded tokens of all requests are sparse, their prompts dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasa_flex.backends.table import sparse_attention
from fasa_flex.core.budget import Budget
from fasa_flex.core.completion import Completion
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult
from fasa_flex.hf.continuous_batching import (
    Pages,
    Request,
    attend_alone,
    attention_now,
    is_written,
    needs_mask,
    reads_pages,
    writes_alone,
)
from fasa_flex.model.paged_forward import PagedForward
from fasa_flex.model.paged_forwards import Beside, PagedForwards
from fasa_flex.model.paged_parts import Group
from fasa_flex.model.several_queries import in_parts, merged
from fasa_flex.model.shared import OfOneModel, Shared
from fasa_flex.paged.attention import attend_pages, whole_rows
from fasa_flex.paged.pages import write_states

IN_PAGES = ("auto", "fastest", "triton", "gather")
"""Backends that read packed keys and selected rows in pages; the others read all keys and values of a request."""


class PagedLayer(OfOneModel):
    """One attention layer, for forwards of continuous batching.

    Args:
        number: number of the layer, from 0.
        begins: whether it is the model's first attention layer.
        implementation: name of the model's own attention in transformers, such as "sdpa".
        shared: objects that all layers share.
        budget: number of keys that a sparse query attends to; None: the layer stays dense.
        scorer: returns the layer's scorer; None: it is dense, or not calibrated yet.
    """

    def __init__(
        self,
        number: int,
        begins: bool,
        implementation: str,
        shared: Shared,
        budget: Budget | None,
        scorer: Callable[[], Scorer | None],
    ) -> None:
        self._number, self._begins, self._implementation = number, begins, implementation
        self._budget, self._scorer = budget, scorer
        self._forwards: PagedForwards = shared.paged
        self._stats, self._source, self._backend = shared.stats, shared.source, shared.config.backend
        self._packs = shared.packs and self._backend in IN_PAGES
        self._group_reduce, self._samples = shared.group_reduce, shared.samples
        self._completes, self._strength = shared.completes, shared.strength

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook before the attention module: begin the forward in the first layer; read no earlier keys in sparse ones.

        Raises:
            NotImplementedError: `PagedForwards.begin` refuses the forward.
        """
        if self._begins:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            table = kwargs.get("block_table")
            self._forwards.begin(kwargs["cache"], self._number, states.shape[1], states.device, table)
        return None if self._budget is None or self._scorer() is None else (args, writes_alone(kwargs))

    def attend(self, call: AttentionCall) -> AttentionResult:
        """Compute attention [1, N, Hq, Dv] of a packed row of N new tokens.

        Keys and values of the call are those of the new tokens in a layer that may be sparse.
        """
        query, key, value, options = call.query, call.key, call.value, call.options
        scorer, forward = self._scorer(), self._forwards.now
        stays_dense = scorer is None or self._budget is None
        if stays_dense and reads_pages(call.module, options):
            call.dense = attention_now(call.module)
            result = call.run_dense()
            self._stats.add(self._number, forward.tally())
            self._measure(call, forward)
            return result
        pages = self._forwards.pages(forward.cache, self._number)
        plan, written = forward.plan(pages), is_written(options)
        new_key, new_value = (states[0, :, : forward.count].transpose(0, 1) for states in (key, value))
        if stays_dense or self._budget is None:
            write_states(pages, None, new_key, new_value, plan.new, written)
            self._stats.add(self._number, forward.tally())
            return self._row(call, [(forward.every, self._short(call, forward.every, pages))]), None
        packer = scorer if self._packs and isinstance(scorer, DominantChunks) else None
        beside = self._forwards.beside(forward.cache, self._number, pages, packer, self._completing)
        beside.begin(pages, plan, forward.slots(pages))
        beside.advance(pages, plan, new_key, new_value, written)
        parts = forward.parts(self._budget)
        self._stats.add(self._number, forward.tally(self._budget))
        softmax = call.softmax(self._implementation)
        done: list[tuple[Group | Request, Tensor]] = []
        if parts.decoding:
            done.append((parts.decoding, self._decode(query, parts.decoding, pages, beside, forward, softmax)))
        if parts.short:
            done.append((parts.short, self._short(call, parts.short, pages)))
        for row, request in parts.alone.items():
            keys, values = self._states_of(row, key, value, pages)
            queries = query[:, :, request.tokens]
            masked = needs_mask(call.module, request.new, request.end)
            one = attend_alone(call, queries, keys, values, forward.causal(row) if masked else None)
            if row in parts.first_sparse:
                sparse, first = parts.sparse[:, request.tokens].to(query.device), parts.first_sparse[row]
                one = self._mixed(queries, keys, values, one, sparse, first, softmax)
            done.append((request, one[0]))
        return self._row(call, done), None

    @staticmethod
    def _row(call: AttentionCall, done: list[tuple[Group | Request, Tensor]]) -> Tensor:
        """The packed row [1, N, Hq, Dv] of the attention [.., Hq, Dv] of its requests."""
        length = call.query.shape[2]
        if len(done) == 1 and len(done[0][1]) == length:
            return done[0][1][None]
        out = call.query.new_zeros(1, length, *done[0][1].shape[1:])
        for each, result in done:
            out[0, each.tokens] = result
        return out

    @property
    def _completing(self) -> bool | None:
        """Whether states hold the covariance; None: there are no states."""
        return self._strength != 0.0 if self._completes and self._packs else None

    def _short(self, call: AttentionCall, group: Group, pages: Pages) -> Tensor:
        """Dense attention [B, Hq, Dv] of one token for each of B requests, over all of their keys."""
        table, valid = self._forwards.now.table(pages, group), group.valid()
        keys, values = (whole_rows(states, table, pages, valid) for states in (pages.keys, pages.values))
        queries = call.query[0, :, group.tokens].transpose(0, 1)[:, :, None]
        return attend_alone(call, queries, keys, values, valid[:, 0])[:, 0]

    def _decode(
        self, query: Tensor, group: Group, pages: Pages, beside: Beside, forward: PagedForward, softmax: Softmax
    ) -> Tensor:
        """Attention [B, Hq, Dv] of one decoded token for each of B requests."""
        table, budget = forward.table(pages, group), self._budget
        queries = query[0, :, group.tokens].transpose(0, 1)[:, :, None]
        scorer: Any = self._scorer()
        batch, heads = len(table), pages.keys.shape[1]
        completion = self._completion(scorer)
        assert budget is not None
        if beside.packed is not None:
            if beside.states is not None:
                completion = Completion(self._strength, beside.states.all)
            packed, valid = beside.packed.keys, group.valid(table.shape[1] * pages.page)
            key, value = (
                query.new_empty(states.shape[2]).expand(batch, heads, valid.shape[-1], -1)
                for states in (pages.keys, pages.values)
            )
        else:
            packed, valid = None, group.valid()
            key, value = (whole_rows(states, table, pages, valid) for states in (pages.keys, pages.values))
        marks = group.marks(valid.shape[-1], budget, self._samples)
        settings = (budget, self._group_reduce, softmax, packed, None, marks, completion)
        call = Call(queries, key, value, scorer, valid, *settings)
        if packed is None:
            if forward.room is not None:
                raise NotSupportedError(
                    f"a CUDA graph needs packed keys in pages, which {type(scorer).__name__} under backend="
                    f"{self._backend!r} does not read; pass ContinuousBatchingConfig(use_cuda_graph=False)."
                )
            return sparse_attention(call, self._backend)[:, :, 0]
        return attend_pages(call, pages, table, forward.plan(pages).slots[group.rows], self._backend)[:, :, 0]

    def _completion(self, scorer: Scorer) -> Completion | None:
        """The completion of calls that read all keys and values; None: there is none."""
        return Completion(self._strength, None, scorer.completes_by_all) if self._completes else None

    def _states_of(self, row: int, key: Tensor, value: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
        """All keys and values of one request, float [1, Hkv, T, D]."""
        request = self._forwards.now.requests[row]
        if not request.past:
            return key[:, :, request.tokens], value[:, :, request.tokens]
        rows = self._forwards.now.rows_of(pages, row)
        return pages.keys[rows].transpose(0, 1)[None], pages.values[rows].transpose(0, 1)[None]

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, dense: Tensor, sparse: Tensor, first: int, softmax: Softmax
    ) -> Tensor:
        """Attention [1, Q, Hq, Dv] of one request's tokens, some of which were generated and are computed again."""
        scorer: Any = self._scorer()
        valid = valid_keys(query.shape[2], key.shape[2], None, query.device)[:, :, :, first:]
        completion = self._completion(scorer)
        assert self._budget is not None
        call = Call(query[:, :, first:], key, value, scorer, valid, self._budget, self._group_reduce, softmax)
        call.completion = completion
        backend = "auto" if self._backend == "triton" else self._backend  # it decodes one query a row
        return merged((dense, None), in_parts(call, backend), None, sparse, first)[0]

    def _measure(self, call: AttentionCall, forward: PagedForward) -> None:
        """Calibrate on the first prompt that is long enough, if there is no profile yet."""
        source, query = self._source, call.query
        if source is None or source.profile is not None:
            return
        row = forward.longest_prompt
        if row is None:
            return
        if self._begins:
            source.begin()
        if not source.measures(self._number):
            return
        request, pages = forward.requests[row], self._forwards.pages(forward.cache, self._number)
        key = pages.keys[forward.rows_of(pages, row)].transpose(0, 1)[None]
        n_valid = torch.arange(request.past + 1, request.end + 1, device=query.device)[None]
        source.measure(self._number, query[:, :, request.tokens], key, None, n_valid, None, call.scaling)
