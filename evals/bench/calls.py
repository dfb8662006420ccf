"""One call of `fasa_attention` against a float64 reference: which there are, and whether one is right.

The reference is written here from the paper's definitions with plain torch operations in float64, one head at a time;
nothing of fasa_flex is in it. Rows whose last key taken and first key left score within rounding of each other are not
compared, and counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fasa_flex import RotaryLayout, fasa_attention
from fasa_flex.packing import PackedKeys
from fasa_flex.scoring import DominantChunks

KV_HEADS = 2
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of a head's output, relative to its norm."""
MARGIN = 1e-4
"""Of the spread of a row's scores: nearer ones may be ranked otherwise in float32."""
SOFTCAP = 3.0
"""Of the cases that have one: below their largest logits."""


@dataclass(frozen=True)
class Case:
    """One call of `fasa_attention`."""

    backend: str
    dtype: str
    head_dim: int
    group: int
    batch: int
    context: int
    n_fac: int
    packed: str
    group_reduce: str
    padded: bool
    softer: bool = False  # the logits are capped, and there are learned sinks


def reference(
    q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, case: Case, key_mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The method in float64: outputs [B, Hq, D], and each row's margin [B, Hkv], relative to the spread of its scores.

    q [B, Hq, D] is the last query; k and v are [B, Hkv, T, D]; sinks are [Hq].
    """
    batch, heads, context, dim = k.shape
    scale = dim**-0.5
    out, margins = torch.zeros_like(q, dtype=torch.float64), torch.full((batch, heads), torch.inf)
    for b, h in itertools.product(range(batch), range(heads)):
        rows = slice(h * case.group, (h + 1) * case.group)
        queries = q[b, rows].double()
        valid = torch.arange(context, device=q.device) if key_mask is None else key_mask[b].nonzero()[:, 0]
        scores = torch.zeros(case.group, len(valid), dtype=torch.float64, device=q.device)
        for pair in chunks[h].tolist():
            scores += queries[:, pair] @ k[b, h][:, pair][valid].double().T
        weights = (scale * scores).softmax(-1)
        ranking = scores.amax(0) if case.group_reduce == "max" else weights.mean(0).log()
        order = ranking.argsort(descending=True)
        chosen = valid[order[: case.n_fac]]
        if len(valid) > case.n_fac:
            last, first = ranking[order[case.n_fac - 1]], ranking[order[case.n_fac]]
            margins[b, h] = float((last - first) / ranking.std())
        logits = scale * queries @ k[b, h, chosen].double().T
        if sinks is not None:
            logits = torch.cat([SOFTCAP * (logits / SOFTCAP).tanh(), sinks[rows, None].double()], dim=-1)
        out[b, rows] = logits.softmax(-1)[:, : case.n_fac] @ v[b, h, chosen].double()
    return out, margins


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """One case: the worst relative error over the heads that are compared."""
    generator = torch.Generator(device).manual_seed(case.context + case.group)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int, length: int) -> Tensor:
        size = (case.batch, heads, length, case.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v = draw(KV_HEADS * case.group, 1), draw(KV_HEADS, case.context), draw(KV_HEADS, case.context)
    planes = RotaryLayout.half_split(case.head_dim).chunks
    picked = [torch.randperm(len(planes), generator=torch.Generator().manual_seed(h)) for h in range(KV_HEADS)]
    chunks = planes[torch.stack(picked)[:, : case.head_dim // 8]].to(device)
    key_mask = None
    if case.padded:
        lengths = torch.arange(case.batch, device=device) * (case.context // (2 * case.batch))
        key_mask = torch.arange(case.context, device=device) >= lengths[:, None]
    sinks = torch.linspace(-2, 4, q.shape[1], device=device) if case.softer else None
    expected, margins = reference(q[:, :, 0], k, v, chunks, case, key_mask, sinks)
    rows = DominantChunks.from_chunks(chunks).pack(k)
    packed: Any = {"none": None, "rows": rows, "tiles": PackedKeys.of(rows)}[case.packed]
    with torch.no_grad():
        got = fasa_attention(
            q,
            k,
            v,
            chunks,
            n_fac=case.n_fac,
            group_reduce=case.group_reduce,
            key_mask=key_mask,
            packed_keys=packed,
            backend=case.backend,
            softcap=SOFTCAP if case.softer else None,
            sinks=sinks,
        )[:, :, 0].double()
    clear = (margins > MARGIN).to(device).repeat_interleave(case.group, dim=1)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(torch.where(clear, errors, 0.0).amax())
    if errors[clear].isnan().any():
        worst = float("nan")
    compared = float(clear.float().mean())
    return {"error": worst, "compared": compared, "ok": worst <= TOLERANCE[dtype] and compared >= 0.5}


def cases(small: bool, kernels: bool) -> Iterator[Case]:
    """All values of every setting; flex in fewer combinations, since each compiles a kernel."""
    contexts = (1024, 1500) if small else (1024, 4096, 16384 + 7, 32768, 131072)
    dtypes = ("float32",) if small else ("bfloat16", "float16")
    n_fac, packed = (64 if small else 256), ("tiles", "rows", "none")
    flex = [("bfloat16", 128, 4, 1), ("float16", 64, 7, 8), ("bfloat16", 128, 8, 8), ("bfloat16", 64, 1, 1)]
    flex += [("float16", 128, 1, 8), ("float16", 64, 4, 1), ("float16", 128, 7, 1), ("bfloat16", 64, 8, 8)]
    if small:
        flex = [("float32", 64, 4, 2)]
    for number, (dtype, head_dim, group, batch) in enumerate(flex):
        for at, context in enumerate(contexts):
            reduce = "softmax" if number % 2 == 0 else "max"
            padded = batch > 1 and at % 2 == 1
            softer = kernels and (number + at) % 4 == 0  # without CUDA flex has no sinks
            yield Case(
                "flex", dtype, head_dim, group, batch, context, n_fac, packed[number % 3], reduce, padded, softer
            )
    groups, batches = ((1, 4), (2,)) if small else ((1, 4, 7, 8), (1, 8))
    every = itertools.product(dtypes, (64, 128), groups, batches, contexts)
    for number, (dtype, head_dim, group, batch, context) in enumerate(every):
        reduce = "softmax" if number % 2 == 0 else "max"
        fields = dtype, head_dim, group, batch, context, n_fac
        flags = reduce, batch > 1 and number % 3 == 0, number % 4 == 1
        yield Case("gather", *fields, packed[number % 3], *flags)
        if kernels:
            yield Case("triton", *fields, "tiles", *flags)
    for dtype, group in itertools.product(dtypes, groups):
        yield Case("reference", dtype, 64, group, 1, contexts[0], n_fac, "none", "softmax", False)


def flex_by_its_decode_kernel(*arguments: Any, **named: Any) -> Any:
    """`flex_attention`, which raises where Inductor would fall back to its kernel for many queries."""
    return flex_attention(*arguments, **{**named, "kernel_options": {"BACKEND": "TRITON_DECODE"}})


def check_decode_kernel(case: Case, device: torch.device) -> dict[str, Any]:
    """One case of the flex backend, whose decode kernel must serve it."""
    torch._dynamo.reset()
    with mock.patch("fasa_flex.attention.flex_attention", flex_by_its_decode_kernel):
        return check(case, device)
