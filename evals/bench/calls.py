"""Checks of single calls of `fasa_attention` against a float64 reference, and the list of cases.

The reference implements the paper's definitions in plain float64 torch operations, one head at a time, without code of
fasa_flex. Rows in which the scores of the last selected and the first unselected key differ by rounding only are
counted, not compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fasa_flex import RotaryLayout, fasa_attention
from fasa_flex.core.completion import CompletionState
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks

KV_HEADS = 2
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest error of a head's output, relative to its norm."""
MARGIN = 1e-4
"""Least difference of two scores, as a share of the row's range, that float32 certainly ranks alike."""
MANY, SWAPPED = 1024, 4.0
"""Above this budget unclear heads are compared, too, and may be off by this number over the root of the budget."""
LEVELS = {"int8": 127, "int4": 7}
FIRST, LAST = 4, 32
"""Numbers of first and last tokens that the defaults always select, at most an eighth and a half of the budget."""
SHARP = 40.0
"""Factor of the queries of the cases with sharp weights."""
SOFTCAP = 3.0
"""Soft cap of the cases with one, smaller than their largest logits."""


@dataclass(frozen=True)
class Case:
    """One call of `fasa_attention`."""

    backend: str
    dtype: str
    head_dim: int
    group: int
    batch: int
    context: int
    n_fac: int | float  # a share of the valid keys
    packed: str
    group_reduce: str
    padded: bool
    softer: bool = False  # the logits are capped, and there are learned sinks
    centred: bool = False  # the keys are scored less a mean key
    strength: float | None = None  # of the completion
    sharp: bool = False  # queries are SHARP times as long, so that most weights are far below those of the sample


def rounded(rows: Tensor, packed: str) -> Tensor:
    """Keys [T, D], rounded as packed keys are."""
    if packed not in LEVELS:
        return rows
    rows, most = rows.float(), LEVELS[packed]
    scales = (rows.abs().amax(-1, keepdim=True) / most).clamp(min=2**-14).half().float()
    return (rows / scales).round().clamp(-most, most) * scales


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Tensor,
    case: Case,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    mean_key: Tensor | None,
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
        dims, keys, values = chunks[h].flatten(), k[b, h][valid], v[b, h][valid].double()
        mean = torch.zeros_like(keys[0]) if mean_key is None else mean_key[h].to(keys.dtype)
        parts = rounded(keys[:, dims] - mean[dims], case.packed).double()
        scores = queries @ mean.double()[:, None] + queries[:, dims] @ parts.T
        keys = keys.double()

        def logits_of(products: Tensor) -> Tensor:
            logits = scale * products
            return logits if sinks is None else SOFTCAP * (logits / SOFTCAP).tanh()

        logits, number = logits_of(scores), torch.arange(len(valid), device=q.device)
        sampled = (number < 4) | (number % 32 == 0) | (number >= len(valid) - 64)
        ranking = {"max": scores.amax(0), "mean": scores.mean(0)}.get(case.group_reduce)
        if ranking is None:
            over = logits[:, sampled] if case.group_reduce == "softmax" else logits
            ranking = (logits - over.logsumexp(-1, keepdim=True)).logsumexp(0)
        if case.group == 1:
            ranking = scores[0]
        spread = ranking.std()
        budget = case.n_fac if isinstance(case.n_fac, int) else math.ceil(case.n_fac * len(valid))
        forced = (number < min(FIRST, budget // 8)) | (number >= len(valid) - min(LAST, budget // 2))
        ranking = torch.where(forced, torch.inf, ranking)
        order = ranking.argsort(descending=True)
        chosen = order[:budget]
        if len(valid) > budget:
            last, first = ranking[order[budget - 1]], ranking[order[budget]]
            margins[b, h] = float((last - first) / spread)
        exact = logits_of(queries @ keys[chosen].T)
        result, mass = exact.softmax(-1) @ values[chosen], exact.logsumexp(-1)
        covered = slice(4, len(valid) // 64 * 64)
        if case.strength is not None and len(valid) >= 64:
            share = (logits[:, chosen].logsumexp(-1) - logits.logsumexp(-1)).exp()[:, None]
            centre = keys[covered] - keys[covered].mean(0)
            tilt = centre.T @ values[covered] / len(centre)
            rest = values[covered].mean(0) + case.strength * scale * queries @ tilt
            result, mass = share * result + (1 - share) * rest, mass - share[:, 0].log()
        if sinks is not None:
            result = result * torch.sigmoid(mass - sinks[rows].double())[:, None]
        out[b, rows] = result
    return out, margins


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Check one case; the result has the largest relative error over the compared heads, scaled to what is allowed."""
    generator = torch.Generator(device).manual_seed(case.context + case.group)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int, length: int) -> Tensor:
        size = (case.batch, heads, length, case.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v = draw(KV_HEADS * case.group, 1), draw(KV_HEADS, case.context), draw(KV_HEADS, case.context)
    q = q * SHARP if case.sharp else q
    planes = RotaryLayout.half_split(case.head_dim).chunks
    picked = [torch.randperm(len(planes), generator=torch.Generator().manual_seed(h)) for h in range(KV_HEADS)]
    chunks = planes[torch.stack(picked)[:, : case.head_dim // 8]].to(device)
    key_mask = None
    if case.padded:
        lengths = torch.arange(case.batch, device=device) * (case.context // (2 * case.batch))
        key_mask = torch.arange(case.context, device=device) >= lengths[:, None]
    sinks = torch.linspace(-2, 4, q.shape[1], device=device) if case.softer else None
    mean_key = torch.linspace(-1, 1, KV_HEADS * case.head_dim, device=device).view(KV_HEADS, -1)
    mean_key = mean_key if case.centred else None
    expected, margins = reference(q[:, :, 0], k, v, chunks, case, key_mask, sinks, mean_key)
    rows, state = DominantChunks(chunks.flatten(1), mean_key).pack(k), None
    packed: Any = {"none": None, "rows": rows}.get(case.packed)
    if case.packed not in ("none", "rows"):
        packed = PackedKeys.of(rows, None if case.packed == "tiles" else case.packed)  # type: ignore[arg-type] # a name
    if case.strength is not None:
        valid = torch.ones(1, case.context, dtype=torch.bool, device=device) if key_mask is None else key_mask
        state = CompletionState.empty(k, v, case.strength != 0)
        state.advance(k, v, valid, valid.cumsum(-1), case.context)
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
            mean_key=mean_key,
            state=state,
            completion_strength=case.strength or 0.0,
        )[:, :, 0].double()
    clear = (margins > MARGIN).to(device).repeat_interleave(case.group, dim=1)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    budget, tolerance = case.n_fac if isinstance(case.n_fac, int) else int(case.n_fac * case.context), TOLERANCE[dtype]
    compared, unclear = clear, 0.0
    if budget > MANY:  # scores lie too close; a key that is swapped for the next one moves the result by 1.4 / sqrt(K)
        compared, unclear = torch.ones_like(clear), SWAPPED / math.sqrt(budget)
    allowed = torch.where(clear, tolerance, tolerance + unclear)
    worst = float(torch.where(compared, errors * tolerance / allowed, 0.0).amax())
    if errors[compared].isnan().any():
        worst = float("nan")
    share = float(compared.float().mean())
    return {"error": worst, "compared": share, "ok": worst <= tolerance and share >= 0.5}


def cases(small: bool, kernels: bool) -> Iterator[Case]:
    """Cases that cover all values of every setting; fewer for flex, since each case compiles a kernel."""
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
    rankings = ("softmax", "max", "softmax", "mean", "softmax_exact")
    for number, (dtype, head_dim, group, batch, context) in enumerate(every):
        fields = dtype, head_dim, group, batch, context, n_fac
        flags = rankings[number % 5], batch > 1 and number % 3 == 0, number % 4 == 1
        whole: dict[str, Any] = {"centred": number % 7 < 4, "strength": (None, 0.75, 0.0, 0.75)[number // 3 % 4]}
        yield Case("gather", *fields, (*packed, "int4")[number % 4], *flags, **whole)
        if kernels:
            yield Case("triton", *fields, ("int4", "tiles", "int8")[number % 3], *flags, **whole)
    if kernels:  # odd lengths, groups and budgets
        odd = itertools.product(dtypes, (2, 3, 5, 16), (1027, 33001), (64, 129, 1000))
        for number, (dtype, group, context, budget) in enumerate(odd):
            fields = dtype, (64, 128, 96)[number % 3], group, 3, context, budget, ("int4", "int8")[number % 2]
            flags = ("softmax", "softmax_exact", "softmax", "max")[number % 4], number % 3 == 0, number % 5 == 0
            sharp = number % 4 > 1 and not flags[2]  # a cap would make near-ties of all large logits
            yield Case("triton", *fields, *flags, number % 2 == 0, (0.75, None)[number % 7 == 6], sharp)
        large = itertools.product(dtypes, (3, 4), (1027, 33001, 131072), (1500, 12000, 1 / 32, 3 / 8))
        for number, (dtype, group, context, share) in enumerate(large):  # shares are whole numbers in binary
            fields = dtype, (64, 128)[number // 12 % 2], group, 3, context, share, ("int4", "int8", "tiles")[number % 3]
            flags = ("softmax", "max", "mean")[number // 5 % 3], number % 2 == 0, number % 7 == 0
            yield Case("triton", *fields, *flags, strength=(0.75, None)[number % 5 == 4])
    for dtype, group in itertools.product(dtypes, groups):
        yield Case("reference", dtype, 64, group, 1, contexts[0], n_fac, "none", "softmax", False)


def flex_by_its_decode_kernel(*arguments: Any, **named: Any) -> Any:
    """`flex_attention` that raises if Inductor would not use its decode kernel."""
    return flex_attention(*arguments, **{**named, "kernel_options": {"BACKEND": "TRITON_DECODE"}})


def check_decode_kernel(case: Case, device: torch.device) -> dict[str, Any]:
    """Check one case of the flex backend that Inductor's decode kernel must serve."""
    torch._dynamo.reset()
    with mock.patch("fasa_flex.core.method.flex_attention", flex_by_its_decode_kernel):
        return check(case, device)
