"""Checks FASA on this device: every backend against a float64 reference, decoding against the ``reference`` backend.

    python -m evals.bench.check_cuda --out runs          # on CUDA
    python -m evals.bench.check_cuda --part 2/2 ...      # every second check from the second on, on one of two GPUs
    python -m evals.bench.check_cuda --small             # the same on CPU, small: a dry run

The calls and their reference are in `evals.bench.calls`, the checks of what kernels write in `evals.bench.writes`.
Writes JSON after every check, with the remaining checks. The exit code is 1 if a check failed or none ran.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from evals.bench.calls import Case, cases, check, check_decode_kernel
from evals.bench.writes import check_state, check_writing
from fasa_flex import FasaCache, FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.bench.record import RowLedger, command_line, provenance, reason_of
from fasa_flex.hf.compatibility import cache_argument

NEAR_TIE = 1e-3
"""Logits that differ by less may give another token if operations are reordered."""


def decoding_model(device: torch.device) -> tuple[PreTrainedModel, FasaProfile]:
    """A random model whose attention is far from uniform, and its profile."""
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
    profile = calibrate(model, [torch.randint(3, 512, (64,))], top_k=8, max_new_tokens=1, progress=False)
    return model, profile


@torch.no_grad()
def decode(model: PreTrainedModel, run: Any, prompt: Tensor, steps: int, cache: Cache) -> tuple[Tensor, Tensor]:
    """Greedy tokens [steps] and their logits [steps, V]; ``run`` computes the steps."""
    held = cache_argument(model, cache)
    row = model(prompt, **held).logits[:, -1]
    tokens, logits = [row.argmax(-1)], [row.float().clone()]
    for _ in range(steps - 1):
        row = run(tokens[-1][:, None], **held).logits[:, -1]
        tokens.append(row.argmax(-1))
        logits.append(row.float().clone())
    return torch.cat(tokens), torch.cat(logits)


def check_decoding(device: torch.device, backend: str, placement: str, steps: int) -> dict[str, Any]:
    """Compare decoding with a backend and decoding with the ``reference`` backend.

    Decoding is compiled (with CUDA graphs on CUDA), on a static cache with keys in the memory ``placement``. With
    ``placement`` "growing" it is uncompiled on a growing cache, `generate`'s default. A compiled model's keys may
    differ by one ulp and so round to another 4-bit code, so compiled decoding packs keys in the cache's precision.
    """
    model, profile = decoding_model(device)
    prompt = torch.randint(3, 512, (1, 700 if steps > 100 else 80), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(device)
    mode = "reduce-overhead" if device.type == "cuda" else None
    growing = placement == "growing"
    packed = FasaConfig().packed_dtype if growing else None
    config = FasaConfig(n_fac=64 if steps > 100 else 16, backend=backend, packed_dtype=packed)
    length = prompt.shape[1] + steps
    if growing:
        cache, run = DynamicCache(config=model.config), model
    else:
        cache = FasaCache(model, profile, config, placement=placement, max_cache_len=length)
        run = torch.compile(model, fullgraph=True, mode=mode)
    with enable(model, profile, replace(config, backend="reference")):
        expected, wanted = decode(model, model, prompt, steps, DynamicCache(config=model.config))
    counters.clear()
    with enable(model, profile, config) as fasa:
        got, logits = decode(model, run, prompt, steps, cache)
        sparse = fasa.stats.sparse_queries
    same = int((got == expected).int().cumprod(0).sum())
    error = float((logits[:same] - wanted[:same]).norm() / wanted[:same].norm())
    skipped = dict(counters["inductor"]).get("cudagraph_skips", 0)
    best = wanted[min(same, steps - 1)].topk(2).values
    gap = float((best[0] - best[1]) / wanted.std())
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
    """Run the check that ``key`` names, in any process; an exception counts as a failure."""
    at, named = torch.device(device), dict(key)
    try:
        if named.pop("decoding", False):
            return check_decoding(at, steps=steps, **named)
        if named.pop("state", False):
            return check_state(**named, device=at)
        if named.pop("writing", False):
            return check_writing(**named, device=at)
        run = check_decode_kernel if named.pop("decode_kernel", False) else check
        return run(Case(**named), at)
    except Exception as error:
        return {"ok": False, "reason": reason_of(error)}
    finally:
        if at.type == "cuda":
            torch.cuda.empty_cache()


def keys(small: bool, cuda: bool) -> list[dict[str, Any]]:
    """The checks: first decoding, which takes longest, then calls in an order that soon covers every setting."""
    ways = [("gather", "device"), ("gather", "host"), ("gather", "growing")]
    if cuda:
        ways += [("triton", "device"), ("triton", "host"), ("triton", "growing")]  # flex has no float32 there
    found = [asdict(case) for case in cases(small, cuda)]
    if cuda:
        by_group = (Case("flex", "bfloat16", 128, group, 1, 4096, 256, "none", "max", False) for group in (1, 4, 7, 8))
        found += [{"decode_kernel": True, **asdict(case)} for case in by_group]
        found += [
            {"writing": True, "dtype": dtype, "packed": packed, "centred": centred}
            for dtype in ("float32", "bfloat16", "float16")
            for packed in ("tiles", "int8", "int4")
            for centred in (False, True)
        ]
    found += [
        {"state": True, "dtype": dtype, "head_dim": dim, "first_order": first_order}
        for dtype in ("float32", "bfloat16")
        for dim in (64, 128, 256)
        for first_order in (True, False)
    ]
    random.Random(0).shuffle(found)
    decoding = ({"decoding": True, "backend": b, "placement": p} for b, p in ways)
    return [*decoding, *found]


def of_part(text: str) -> slice:
    """Every N-th check from the K-th on, for a ``text`` of K/N."""
    first, _, parts = text.partition("/")
    if not (first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; pass K/N with K from 1 to N, as 1/2.")
    return slice(int(first) - 1, None, int(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for check_<device>.json (default: runs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a dry run in float32")
    parser.add_argument("--seconds", type=float, default=130, help="start no check after these seconds (default: 130)")
    parser.add_argument("--workers", type=int, help="processes (default: half the cores, at most 8; 1 without CUDA)")
    parser.add_argument("--part", type=of_part, default="1/1", help="K/N: the K-th of N parts of the checks")
    options = parser.parse_args()
    device, begun = torch.device(options.device), time.monotonic()
    cuda = device.type == "cuda"
    workers = options.workers or (max(1, min(8, (os.cpu_count() or 1) // 2)) if cuda else 1)
    origin = provenance(command_line("evals.bench.check_cuda"), device)
    head = {**origin, "settings": {"small": options.small, "device": device.type}}
    ledger = RowLedger(options.out / f"check_{device.type}.json", head)
    todo = [key for key in keys(options.small, cuda)[options.part] if not ledger.has(key)]
    late = f"no time left of {options.seconds:.0f} s"
    ledger.data["left_out"] = [{**key, "reason": late} for key in todo]
    # a check mostly compiles, which runs in parallel in several processes of few threads
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(perform, key, options.device, 40 if options.small else 500): key for key in todo}
        for done in as_completed(running):
            if done.cancelled():
                continue
            key, result = running[done], done.result()
            ledger.data["left_out"] = [left for left in ledger.data["left_out"] if not key.items() <= left.items()]
            ledger.add({**key, **result})
            if not result["ok"]:
                print(f"[{time.monotonic() - begun:.0f} s] WRONG: {key} {result}", flush=True)
            if time.monotonic() - begun > options.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
    ledger.data["seconds"] = round(time.monotonic() - begun)  # of this run
    ledger.write()
    wrong = [row for row in ledger.rows if not row["ok"]]
    for row in ledger.rows:  # failures were printed when they occurred
        if row.get("decoding") and row["ok"]:
            print(f"ok: {row}")
    print(
        f"{len(ledger.rows)} checks on {device.type}, {len(wrong)} wrong, {len(ledger.data['left_out'])} left "
        f"out; {time.monotonic() - begun:.0f} s; written to {ledger.path}"
    )
    return 1 if wrong or not ledger.rows else 0


if __name__ == "__main__":
    sys.exit(main())
