"""The rivals of the op benchmark: every available form of dense attention, and FASA with each backend."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fasa_flex.backends.table import sparse_attention
from fasa_flex.baselines.scorers import group_scores
from fasa_flex.bench.settings import BACKENDS, Settings
from fasa_flex.bench.shapes import Shape, random_chunks
from fasa_flex.caches.pinned_memory import host_rows, split_rows
from fasa_flex.core import method
from fasa_flex.core.completion import Completion, CompletionState
from fasa_flex.core.config import Backend
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.resident_rows import ResidentRows
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.core.selection import Marks, valid_keys
from fasa_flex.core.softmax import Softmax

HALF_HELD = "half the rows held"
"""Suffix of FASA-M with half of the selected rows on the device: in the reference model a step newly selects 41 to 64 %
of 64 to 256 rows (evals/results/study/agreement.json, part "renewal")."""

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Inputs:
    """The inputs of one layer's attention call.

    Attributes:
        q: query [B, Hq, 1, D].
        k, v: keys and values [B, Hkv, T, D].
        packed: packed keys.
        chunks: dominant chunks, int64 [Hkv, n_tip, 2].
        valid: valid keys, bool [1, 1, 1, 1, T].
        marks: forced and sampled keys, which a decode step computes once for all layers.
        state: state of the completion; None: no completion.
        host: keys and values in pinned host memory (FASA-M); None without CUDA.
        resident: the rows of ``host`` that are on the device.
        permuted: keys with each head's dominant dimensions first.
        front: order of dimensions in ``permuted``, int64 [Hkv, D].
        front_state: state of the completion for ``permuted``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    packed: PackedKeys
    chunks: Tensor
    valid: Tensor
    marks: Marks | None = None
    state: CompletionState | None = None
    host: tuple[Tensor, Tensor] | None = None
    resident: ResidentRows | None = None
    permuted: Tensor | None = None
    front: Tensor | None = None
    front_state: CompletionState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and packed keys."""
        return self.k.nbytes + self.v.nbytes + self.packed.n_bytes

    @classmethod
    def random(cls, shape: Shape, batch: int, context: int, settings: Settings) -> Inputs:
        """Inputs of normally distributed numbers."""
        device, dtype = settings.device, settings.dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int, length: int) -> Tensor:
            size = (batch, heads, length, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        chunks = random_chunks(shape, settings.chunks_of(shape), device)
        k = draw(shape.kv_heads, context)
        packed = PackedKeys.of(DominantChunks.from_chunks(chunks).pack(k), settings.packed_dtype)
        v = draw(shape.kv_heads, context)
        host = held = None
        if device.type == "cuda":
            host = split_rows(host_rows(k, v, context, device), shape.head_dim)
            held = ResidentRows.empty(k, v, settings.n_fac)
            for pinned, states in zip(host, (k, v), strict=True):
                pinned.copy_(states)
        valid = valid_keys(1, context, None, device)
        completes = settings.completion != "none"
        marks, state = Marks.of(valid, settings.budget, settings.group_reduce == "softmax" or completes), None
        if completes:
            state = CompletionState.empty(k, v, settings.strength != 0.0)
            everyone = valid[0, 0, 0]
            state.advance(k, v, everyone, everyone.cumsum(-1), context)
        x = cls(draw(shape.query_heads, 1), k, v, packed, chunks, valid, marks, state, host, held)
        return x.with_permuted() if "permuted" in settings.backends else x

    def with_permuted(self) -> Inputs:
        """A copy with ``permuted`` keys."""
        dims = self.chunks.flatten(1)
        behind = torch.ones(len(dims), self.k.shape[3], device=dims.device).scatter_(1, dims, 0.0)
        front = torch.cat([dims, behind.argsort(dim=1, descending=True, stable=True)[:, : -dims.shape[1]]], dim=1)
        state = self.state
        if state is not None and state.key_sum.shape[2]:
            rows = front[None, :, :, None].expand_as(state.covariance)
            state = replace(state, covariance=state.covariance.gather(2, rows))
        permuted = self.k.gather(3, front[None, :, None].expand_as(self.k))
        return replace(self, permuted=permuted, front=front, front_state=state)

    def clone(self) -> Inputs:
        """A copy with its own memory."""
        packed = self.packed.change(Tensor.clone)
        permuted = None if self.permuted is None else self.permuted.clone()
        held = None if self.resident is None else self.resident.change(Tensor.clone)
        state = None if self.state is None else self.state.change(Tensor.clone)
        copies: dict[str, Any] = {"packed": packed, "permuted": permuted, "resident": held, "state": state}
        return replace(self, k=self.k.clone(), v=self.v.clone(), **copies)


Call = Callable[[Inputs], Tensor]


def sdpa(x: Inputs) -> Tensor:
    """`scaled_dot_product_attention` without a mask."""
    return F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=x.q.shape[1] != x.k.shape[1])


def grouped_sdpa(x: Inputs) -> Tensor:
    """SDPA with a group's query heads as rows of queries, so that each key is read once for a group."""
    batch, heads, _, dim = x.q.shape
    rows = x.q.view(batch, x.k.shape[1], -1, dim)
    return F.scaled_dot_product_attention(rows, x.k, x.v).view(batch, heads, 1, dim)


def grouped_matmul(x: Inputs) -> Tensor:
    """Two matrix products and a softmax; keys are the left factor, which is fastest on CPUs."""
    batch, heads, _, dim = x.q.shape
    rows = x.q.view(batch, x.k.shape[1], -1, dim)
    weights = ((x.k @ rows.mT) * dim**-0.5).softmax(2)
    out: Tensor = weights.mT @ x.v
    return out.view(batch, heads, 1, -1)


def flex(x: Inputs) -> Tensor:
    """`flex_attention` without a mask, for torch.compile."""
    out: Any = flex_attention(x.q, x.k, x.v, enable_gqa=x.q.shape[1] != x.k.shape[1])
    whole: Tensor = out
    return whole


def grouped_flex(x: Inputs) -> Tensor:
    """`flex` with a group's query heads as rows of queries, for torch.compile."""
    batch, heads, _, dim = x.q.shape
    out: Any = flex_attention(x.q.view(batch, x.k.shape[1], -1, dim), x.k, x.v)
    by_head: Tensor = out.view(batch, heads, 1, dim)
    return by_head


def _with_kernel(call: Call, kernel: SDPBackend) -> Call:
    def run(x: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return call(x)

    return run


def dense_rivals(settings: Settings) -> dict[str, Call]:
    """The dense rivals of this device; FASA is compared with the fastest of them."""
    forms: dict[str, Call] = {"SDPA": sdpa, "grouped SDPA": grouped_sdpa}
    if settings.device.type == "cpu":
        forms["grouped matmul"] = grouped_matmul
    rivals = dict(forms)
    if settings.device.type == "cuda":
        kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        for kernel in kernels:
            kind = kernel.name.removesuffix("_ATTENTION").lower()
            rivals.update({f"{name} ({kind})": _with_kernel(call, kernel) for name, call in forms.items()})
    if "compiled" in settings.modes:
        forms["grouped flex"] = grouped_flex
        if settings.device.type == "cuda":
            forms["flex"] = flex
        rivals.update({f"{name}, compiled": _compiled(call, settings) for name, call in forms.items()})
    return rivals


def sparse_rivals(settings: Settings) -> dict[str, Call | str]:
    """FASA's rivals, or the reason why one is not measured; flex only compiled, since uncompiled it is not sparse."""
    rivals: dict[str, Call | str] = {}
    if "eager" in settings.modes and "gather" in settings.backends:
        rivals["FASA-C gather"] = _fasa(settings, "gather")
    if "eager" in settings.modes and "permuted" in settings.backends:
        rivals["FASA permuted keys"] = _permuted(settings)
    if settings.device.type == "cuda" and "triton" in settings.backends:
        rivals["FASA-C triton"] = _fasa(settings, "triton")
        rivals["FASA-M triton"] = _fasa(settings, "triton", new_rows=1.0)
        rivals[f"FASA-M triton, {HALF_HELD}"] = _fasa(settings, "triton", new_rows=0.5)
    else:
        rivals["FASA-M"] = "without an accelerator it is FASA-C with more steps; the step part runs it"
    if "compiled" in settings.modes:
        if "permuted" in settings.backends:
            rivals["FASA permuted keys, compiled"] = _compiled(_permuted(settings), settings)
        for backend in (name for name in BACKENDS if name in settings.backends):
            if backend == "triton":  # its kernels are compiled already
                continue
            # torch 2.13's CPU code for flex does not compile where two lengths (of keys, of packed tiles) are dynamic
            static = backend == "flex" and settings.device.type == "cpu"
            chosen = replace(settings, static_lengths=True) if static else settings
            rivals[f"FASA-C {backend}, compiled"] = _compiled(_fasa(settings, backend), chosen)
    return rivals


@dataclass(frozen=True, eq=False)
class LeadingDims(Scorer):
    """Scores by the first ``width`` dimensions, the dominant ones of `Inputs.permuted`, without packed keys."""

    width: int

    estimates_logits = True

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`."""
        return group_scores(query[..., : self.width], key[..., : self.width])


def _permuted(settings: Settings) -> Call:
    """FASA on `Inputs.permuted`; permuting the query in the same way leaves attention unchanged."""

    def run(x: Inputs) -> Tensor:
        assert x.permuted is not None
        assert x.front is not None
        batch, dim = x.q.shape[0], x.q.shape[3]
        grouped = x.q.view(batch, x.k.shape[1], -1, dim)
        query = grouped.gather(3, x.front[None, :, None].expand_as(grouped)).view_as(x.q)
        scorer, softmax = LeadingDims(2 * x.chunks.shape[1]), Softmax(dim**-0.5)
        completion = None if x.front_state is None else Completion(settings.strength, x.front_state)
        states, budget = (query, x.permuted, x.v), settings.budget
        call = method.Call(*states, scorer, x.valid, budget, settings.group_reduce, softmax)
        call.marks, call.completion = x.marks, completion
        return sparse_attention(call, "gather")

    return run


def _fasa(settings: Settings, backend: Backend, new_rows: float | None = None) -> Call:
    """The attention call of a model under `enable`, without `fasa_attention`'s checks, which read all keys.

    With ``new_rows`` keys and values are in host memory. Every call selects the same rows, so that share of them is
    first marked as absent from the device.
    """

    def run(x: Inputs) -> Tensor:
        key, value, held = x.k, x.v, None
        if new_rows is not None and x.host is not None and x.resident is not None:
            (key, value), held = x.host, x.resident
            held.forget(new_rows)
        scorer = DominantChunks(x.chunks.flatten(1), dtype=settings.packed_dtype)
        completion = None if x.state is None else Completion(settings.strength, x.state)
        softmax, states, budget = Softmax(x.q.shape[-1] ** -0.5), (x.q, key, value), settings.budget
        call = method.Call(*states, scorer, x.valid, budget, settings.group_reduce, softmax, x.packed, held)
        call.marks, call.completion = x.marks, completion
        return sparse_attention(call, backend)

    return run


def _compiled(call: Call, settings: Settings) -> Call:
    def unpacked(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: PackedKeys,
        chunks: Tensor,
        valid: Tensor,
        marks: Marks | None,
        state: CompletionState | None,
        permuted: Tensor | None,
        front: Tensor | None,
        front_state: CompletionState | None,
    ) -> Tensor:
        changed: dict[str, Any] = {"permuted": permuted, "front": front, "front_state": front_state}
        return call(Inputs(q, k, v, packed, chunks, valid, marks, state, **changed))

    # a separate code object: dynamo limits the recompilations of each one
    code = unpacked.__code__.replace(co_name=f"rival_{next(_NUMBERS)}")
    own = types.FunctionType(code, unpacked.__globals__, code.co_name, None, unpacked.__closure__)
    run: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=settings.dynamic)
    return lambda x: run(
        x.q, x.k, x.v, x.packed, x.chunks, x.valid, x.marks, x.state, x.permuted, x.front, x.front_state
    )
