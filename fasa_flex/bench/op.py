"""One attention call of one decode step: dense attention in every available form, and FASA, side by side.

Keys and values are whole buffers of exactly the context's length, so nothing is charged for growing. Where they would
fit in the processor's cache, a call goes over several copies, as a model goes over its layers: a real decode step finds
no key in the cache either. Keys are random, so selected rows lie scattered over the whole context.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fasa_flex.attention import sparse_attention
from fasa_flex.bench.limits import Reads, attention_reads
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import Shape, random_chunks
from fasa_flex.bench.timing import Timing, free_memory, graphed, interleave, last_level_cache, peak_of
from fasa_flex.budget import Budget
from fasa_flex.config import Backend
from fasa_flex.packing import PackedKeys
from fasa_flex.scoring import DominantChunks
from fasa_flex.selection import valid_keys
from fasa_flex.softmax import Softmax

_NUMBERS = itertools.count()
_MOST_COPIES = 64
_MOST_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error between rivals of one kind, beyond which one of them computes something else."""


@dataclass(frozen=True)
class Inputs:
    """One layer's query [B, Hq, 1, D], keys and values [B, Hkv, T, D], packed keys and chunks.

    ``host`` holds keys and values in pinned memory, where there is an accelerator.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    packed: PackedKeys
    chunks: Tensor
    host: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Of keys, values and packed keys."""
        return self.k.nbytes + self.v.nbytes + self.packed.n_bytes

    @classmethod
    def random(cls, shape: Shape, batch: int, context: int, settings: Settings) -> Inputs:
        """Normal numbers."""
        device, dtype = settings.device, settings.dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int, length: int) -> Tensor:
            size = (batch, heads, length, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        chunks = random_chunks(shape, settings.chunks_of(shape), device)
        k = draw(shape.kv_heads, context)
        packed = PackedKeys.of(DominantChunks.from_chunks(chunks).pack(k), settings.packed_dtype)
        v = draw(shape.kv_heads, context)
        host = (k.cpu().pin_memory(), v.cpu().pin_memory()) if device.type == "cuda" else None
        return cls(draw(shape.query_heads, 1), k, v, packed, chunks, host)

    def clone(self) -> Inputs:
        """The same elsewhere in memory."""
        packed = self.packed.change(Tensor.clone)
        return Inputs(self.q, self.k.clone(), self.v.clone(), packed, self.chunks, self.host)


Call = Callable[[Inputs], Tensor]


def sdpa(x: Inputs) -> Tensor:
    """`scaled_dot_product_attention` as it stands."""
    return F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=x.q.shape[1] != x.k.shape[1])


def grouped_sdpa(x: Inputs) -> Tensor:
    """The query heads of a key/value head as rows of queries: every key is read once a group."""
    batch, heads, _, dim = x.q.shape
    rows = x.q.view(batch, x.k.shape[1], -1, dim)
    return F.scaled_dot_product_attention(rows, x.k, x.v).view(batch, heads, 1, dim)


def flex(x: Inputs) -> Tensor:
    """`flex_attention` without a mask, to be compiled."""
    out: Any = flex_attention(x.q, x.k, x.v, enable_gqa=x.q.shape[1] != x.k.shape[1])
    return out  # type: ignore[no-any-return]


def grouped_flex(x: Inputs) -> Tensor:
    """`flex` with grouped rows, to be compiled."""
    batch, heads, _, dim = x.q.shape
    out: Any = flex_attention(x.q.view(batch, x.k.shape[1], -1, dim), x.k, x.v)
    return out.view(batch, heads, 1, dim)  # type: ignore[no-any-return]


def _with_kernel(call: Call, kernel: SDPBackend) -> Call:
    def run(x: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return call(x)

    return run


def dense_rivals(settings: Settings, compiled_flex: bool = True) -> dict[str, Call]:
    """Every way to attend to all keys that this device offers; the fastest of them is what FASA is compared with."""
    forms: dict[str, Call] = {"SDPA": sdpa, "grouped SDPA": grouped_sdpa}
    rivals = dict(forms)
    if settings.device.type == "cuda":
        kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        for kernel in kernels:
            kind = kernel.name.removesuffix("_ATTENTION").lower()
            rivals.update({f"{name} ({kind})": _with_kernel(call, kernel) for name, call in forms.items()})
    if "compiled" in settings.modes and compiled_flex:
        forms["grouped flex"] = grouped_flex
        if settings.device.type == "cuda":
            forms["flex"] = flex
        rivals.update({f"{name}, compiled": _compiled(call, settings) for name, call in forms.items()})
    return rivals


def sparse_rivals(settings: Settings) -> dict[str, Call | str]:
    """FASA's ways; a sentence instead of a call says why one is not measured here.

    flex is there compiled only: uncompiled it computes every score and drops most.
    """
    rivals: dict[str, Call | str] = {}
    if "eager" in settings.modes and "gather" in settings.backends:
        rivals["FASA-C gather"] = _fasa(settings, "gather")
    if settings.device.type == "cuda" and "triton" in settings.backends:
        rivals["FASA-C triton"] = _fasa(settings, "triton")
        rivals["FASA-M triton"] = _fasa(settings, "triton", host=True)
    else:
        rivals["FASA-M"] = "without an accelerator it is FASA-C with more steps; the step part runs it"
    if "compiled" in settings.modes:
        for backend in settings.backends:
            if backend == "triton":  # nothing is left to compile
                continue
            # torch 2.13's CPU code for flex does not compile where two lengths (of keys, of packed tiles) are dynamic
            static = backend == "flex" and settings.device.type == "cpu"
            chosen = replace(settings, static_lengths=True) if static else settings
            rivals[f"FASA-C {backend}, compiled"] = _compiled(_fasa(settings, backend), chosen)
    return rivals


def _fasa(settings: Settings, backend: Backend, host: bool = False) -> Call:
    """What a model under `enable` runs: without `fasa_attention`'s checks, which read all keys."""

    def run(x: Inputs) -> Tensor:
        key, value = x.host if host and x.host is not None else (x.k, x.v)
        valid = valid_keys(1, key.shape[2], None, x.q.device)
        scorer, softmax = DominantChunks.from_chunks(x.chunks), Softmax(x.q.shape[-1] ** -0.5)
        budget = Budget(settings.n_fac)
        return sparse_attention(
            x.q, key, value, scorer, valid, budget, settings.group_reduce, softmax, backend, x.packed
        )

    return run


def _compiled(call: Call, settings: Settings) -> Call:
    def unpacked(q: Tensor, k: Tensor, v: Tensor, packed: PackedKeys, chunks: Tensor) -> Tensor:
        return call(Inputs(q, k, v, packed, chunks))

    # a code object of its own: dynamo counts recompilations by code object and gives up after a few
    code = unpacked.__code__.replace(co_name=f"rival_{next(_NUMBERS)}")
    own = types.FunctionType(code, unpacked.__globals__, code.co_name, None, unpacked.__closure__)
    run: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=settings.dynamic)
    return lambda x: run(x.q, x.k, x.v, x.packed, x.chunks)


def reads_of(x: Inputs, shape: Shape, settings: Settings) -> Reads:
    """What one call must read, counted on the tensors themselves."""
    batch, heads, context, dim = x.k.shape
    token = x.packed.n_bytes / (batch * heads * context)
    n_tip = settings.chunks_of(shape)
    return attention_reads(context, batch, heads, dim, n_tip, settings.n_fac, x.k.element_size(), token)


def bytes_needed(shape: Shape, batch: int, context: int, settings: Settings) -> int:
    """Of keys, values, packed keys, and the scores and copies that calls make of them."""
    item = settings.dtype.itemsize
    token = shape.kv_heads * 2 * (shape.head_dim + 2 * settings.chunks_of(shape)) * item + shape.query_heads * 24
    return batch * context * token


@torch.no_grad()
def measure(
    shape: Shape,
    batch: int,
    context: int,
    settings: Settings,
    dense: Mapping[str, Call],
    sparse: Mapping[str, Call | str],
) -> dict[str, Any]:
    """One row: all rivals at one context and batch.

    Args:
        dense: from `dense_rivals`; kept over the rows of one batch, so that they compile once.
        sparse: from `sparse_rivals`, likewise.
    """
    device = settings.device
    first = Inputs.random(shape, batch, context, settings)
    reads = reads_of(first, shape, settings)
    wanted = math.ceil(2 * last_level_cache(device) / reads.sparse)
    budget = min(_MOST_BYTES[device.type], free_memory(device) // 4)
    copies = max(1, min(wanted, _MOST_COPIES, budget // first.nbytes))
    layers = [first, *(first.clone() for _ in range(copies - 1))]
    rivals, errors, left_out = _warmed({**dense, **sparse}, set(dense), first)

    def over_layers(call: Call) -> Callable[[], Any]:
        def run() -> None:
            for x in layers:
                call(x)

        return run

    timed = {name: graphed(over_layers(call), device) for name, call in rivals.items()}
    rounds = interleave({name: call for name, (call, _) in timed.items()}, device, settings.repeats, settings.seconds)
    times = {name: Timing(tuple(t / copies for t in timing.seconds)) for name, timing in rounds.items()}
    best = min((name for name in times if name in dense), key=lambda name: times[name].median)
    row: dict[str, Any] = {
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "n_tip": settings.chunks_of(shape),
        "n_fac": settings.n_fac,
        "copies": copies,
        "cold": copies == wanted or wanted <= 1,
        "reads": {"dense": reads.dense, "sparse": reads.sparse},
        "limit": reads.limit,
        "best_dense": best,
        "left_out": left_out,
        "rivals": [],
    }
    for name, timing in times.items():
        kind = "dense" if name in dense else "sparse"
        entry = describe(name, kind, timing, times[best], getattr(reads, kind))
        if kind == "sparse":
            entry["limit_share"] = entry["speedup"] / reads.limit
        peak = peak_of(lambda name=name: rivals[name](first), device)  # type: ignore[misc]
        buffers = first.nbytes - (first.packed.n_bytes if kind == "dense" else 0)
        entry |= {
            "timed": timed[name][1],
            "error": errors[name],
            "memory": {"buffers": buffers, "beyond": peak.bytes, "how": peak.how, "peak": buffers + (peak.bytes or 0)},
        }
        row["rivals"].append(entry)
    return row


def _warmed(
    rivals: Mapping[str, Call | str], dense: set[str], x: Inputs
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """The rivals that run and agree with the first of their kind, their errors, and why the others are left out."""
    good: dict[str, Call] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    first: dict[bool, Tensor] = {}
    for name, call in rivals.items():
        if isinstance(call, str):
            left_out[name] = call
            continue
        try:
            out = call(x).float()
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        expected = first.setdefault(name in dense, out)
        wrong = float((out - expected).norm() / expected.norm())
        if wrong <= TOLERANCE[x.q.dtype]:
            good[name], errors[name] = call, wrong
        else:
            left_out[name] = f"differs from {next(iter(good), 'itself')} by {wrong:.2g} of its norm"
    if not dense & set(good):
        raise RuntimeError(f"no dense attention runs here: {left_out}.")
    return good, errors, left_out


def describe(name: str, kind: str, timing: Timing, best: Timing, read: int) -> dict[str, Any]:
    """What every rival's entry says about its time."""
    first, third = timing.quartiles()
    speedup, low, high = timing.ratio(best)
    return {
        "name": name,
        "kind": kind,
        "seconds": timing.median,
        "quartiles": [first, third],
        "rounds": len(timing.seconds),
        "gb_per_s": read / timing.median / 1e9,
        "speedup": speedup,
        "speedup_quartiles": [low, high],
    }
