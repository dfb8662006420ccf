"""Is FASA right on this device? Every backend against a float64 reference, and static-cache decoding against eager.

    python -m evals.bench.check_cuda --out runs          # on CUDA
    python -m evals.bench.check_cuda --small             # the same on CPU, small: a dry run

The reference is written here from the paper's definitions with plain torch operations in float64, one head at a time;
nothing of fasa_flex is in it. Rows whose last key taken and first key left score within rounding of each other are not
compared, and counted. Writes JSON after every check, with what is still to be done; exit code 1 if one failed, or if
none ran.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, FasaProfile, RotaryLayout, calibrate, enable, fasa_attention
from fasa_flex.bench.record import Ledger, command_line, provenance
from fasa_flex.packing import PackedKeys
from fasa_flex.scoring import DominantChunks

KV_HEADS = 2
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of a head's output, relative to its norm."""
MARGIN = 1e-4
"""Of the spread of a row's scores: nearer ones may be ranked otherwise in float32."""
SOFTCAP = 3.0
"""Of the cases that have one: below their largest logits."""
NEAR_TIE = 1e-3
"""Logits nearer than this may choose another token where operations are reordered."""


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
            group_reduce=case.group_reduce,  # type: ignore[arg-type]
            key_mask=key_mask,
            packed_keys=packed,
            backend=case.backend,  # type: ignore[arg-type]
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


def decoding_model(device: torch.device) -> tuple[PreTrainedModel, FasaProfile]:
    """A random model with attention far from uniform, and a random profile that fits."""
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config = LlamaConfig(
        **fields,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().to(device)
    made = calibrate(model, [torch.randint(3, 512, (64,))], top_k=8, max_new_tokens=1, progress=False)
    return model, FasaProfile(torch.rand(made.agreement.shape), made.layout, made.provenance)


def flex_by_its_decode_kernel(*arguments: Any, **named: Any) -> Any:
    """`flex_attention`, which raises where Inductor would fall back to its kernel for many queries."""
    return flex_attention(*arguments, **{**named, "kernel_options": {"BACKEND": "TRITON_DECODE"}})


def check_decode_kernel(case: Case, device: torch.device) -> dict[str, Any]:
    """One case of the flex backend, whose decode kernel must serve it."""
    torch._dynamo.reset()
    with mock.patch("fasa_flex.attention.flex_attention", flex_by_its_decode_kernel):
        return check(case, device)


@torch.no_grad()
def decode(model: PreTrainedModel, run: Any, prompt: Tensor, steps: int, cache: Cache) -> tuple[Tensor, Tensor]:
    """Greedy tokens [steps] and their logits [steps, V] on a static cache; ``run`` does the steps."""
    row = model(prompt, past_key_values=cache).logits[:, -1]
    tokens, logits = [row.argmax(-1)], [row.float().clone()]
    for _ in range(steps - 1):
        row = run(tokens[-1][:, None], past_key_values=cache).logits[:, -1]
        tokens.append(row.argmax(-1))
        logits.append(row.float().clone())
    return torch.cat(tokens), torch.cat(logits)


def check_decoding(device: torch.device, backend: str, placement: str, steps: int) -> dict[str, Any]:
    """Compiled decoding (CUDA graphs on CUDA), keys at ``placement``, against eager decoding on a plain cache."""
    model, profile = decoding_model(device)
    prompt = torch.randint(3, 512, (1, 700 if steps > 100 else 80), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(device)
    mode = "reduce-overhead" if device.type == "cuda" else None
    config = FasaConfig(n_fac=64 if steps > 100 else 16, backend=backend)  # type: ignore[arg-type]
    length = prompt.shape[1] + steps
    cache = FasaCache(model, profile, config, placement=placement, max_cache_len=length)  # type: ignore[arg-type]
    counters.clear()
    with enable(model, profile, config) as fasa:
        plain = StaticCache(config=model.config, max_cache_len=length)
        expected, eager = decode(model, model, prompt, steps, plain)
        before = fasa.stats.sparse_queries
        got, logits = decode(model, torch.compile(model, fullgraph=True, mode=mode), prompt, steps, cache)
        sparse = fasa.stats.sparse_queries - before
    same = int((got == expected).int().cumprod(0).sum())
    error = float((logits[:same] - eager[:same]).norm() / eager[:same].norm())
    skipped = dict(counters["inductor"]).get("cudagraph_skips", 0)
    best = eager[min(same, steps - 1)].topk(2).values
    gap = float((best[0] - best[1]) / eager.std())
    return {
        "steps": steps,
        "same_tokens": same,
        "logits_error": error,
        "gap_where_they_part": None if same == steps else gap,
        "sparse_queries": sparse,
        "graphs_skipped": skipped,
        "ok": sparse > 0 and not skipped and error < 1e-2 and (same == steps or gap < NEAR_TIE),
    }


def perform(key: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """The check that ``key`` names, in whichever process; one that raises has failed."""
    at, named = torch.device(device), dict(key)
    try:
        if named.pop("decoding", False):
            return check_decoding(at, steps=steps, **named)
        run = check_decode_kernel if named.pop("decode_kernel", False) else check
        return run(Case(**named), at)
    except Exception as error:
        return {"ok": False, "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    finally:
        if at.type == "cuda":
            torch.cuda.empty_cache()


def keys(small: bool, cuda: bool) -> list[dict[str, Any]]:
    """What there is to check: decoding first, for it takes longest, then in an order that soon covers every setting."""
    ways = [("triton", "device"), ("triton", "host"), ("gather", "device"), ("gather", "host"), ("flex", "device")]
    found = [asdict(case) for case in cases(small, cuda)]
    if cuda:
        by_group = (Case("flex", "bfloat16", 128, group, 1, 4096, 256, "none", "max", False) for group in (1, 4, 7, 8))
        found += [{"decode_kernel": True, **asdict(case)} for case in by_group]
    random.Random(0).shuffle(found)
    decoding = ({"decoding": True, "backend": b, "placement": p} for b, p in (ways if cuda else ways[2:4]))
    return [*decoding, *found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for check_<device>.json (default: runs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a dry run in float32")
    parser.add_argument("--seconds", type=float, default=240, help="begin no check after so long (default: 240)")
    parser.add_argument("--workers", type=int, help="processes (default: half the cores, 8 at most; 1 without CUDA)")
    options = parser.parse_args()
    device, begun = torch.device(options.device), time.monotonic()
    cuda = device.type == "cuda"
    workers = options.workers or (max(1, min(8, (os.cpu_count() or 1) // 2)) if cuda else 1)
    origin = provenance(command_line("evals.bench.check_cuda"), device)
    head = {**origin, "settings": {"small": options.small, "device": device.type}}
    ledger = Ledger(options.out / f"check_{device.type}.json", head)
    todo = [key for key in keys(options.small, cuda) if not ledger.has(key)]
    late = f"no time left of {options.seconds:.0f} s"
    ledger.data["left_out"] = [{**key, "reason": late} for key in todo]
    # most of a check is compiling, which many processes do at once; each needs few more for it
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(perform, key, options.device, 40 if options.small else 500): key for key in todo}
        for done in as_completed(running):
            if done.cancelled():
                continue
            key, result = running[done], done.result()
            ledger.data["left_out"] = [left for left in ledger.data["left_out"] if not key.items() <= left.items()]
            ledger.add({**key, **result})
            if not result["ok"] or key.get("decoding"):
                print(
                    f"[{time.monotonic() - begun:.0f} s] {'ok' if result['ok'] else 'WRONG'}: {key} {result}",
                    flush=True,
                )
            if time.monotonic() - begun > options.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
    ledger.write()
    wrong = [row for row in ledger.rows if not row["ok"]]
    print(
        f"{len(ledger.rows)} checks on {device.type}, {len(wrong)} wrong, {len(ledger.data['left_out'])} left "
        f"out; {time.monotonic() - begun:.0f} s; written to {ledger.path}"
    )
    return 1 if wrong or not ledger.rows else 0


if __name__ == "__main__":
    sys.exit(main())
