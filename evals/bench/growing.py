"""Seconds of a decode step with `generate`'s defaults: uncompiled, on a growing cache.

    python -m evals.bench.growing --device cuda --shape llama-3.1-8b --contexts 1024 8192 32768 65536 --out runs
    python -m evals.bench.growing --device cpu --shape llama-3.2-1b --layers 4 --contexts 1024 4096 16384 --out runs

On a GPU such a step is limited by Python's speed under any attention. As in real decoding, every step has another
length. The variants run in turns, each with its own cache. "flash" is the model's dense attention with PyTorch
restricted to FlashAttention, so that cuDNN plans nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from fasa_flex.bench.record import RowLedger, command_line, provenance
from fasa_flex.bench.shapes import SHAPES, Shape, random_profile
from fasa_flex.bench.step import twin
from fasa_flex.bench.timing import Timing, synchronize
from fasa_flex.core.config import Backend, FasaConfig
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.model.enable import enable

WARM, STEPS = 5, 25
FASA: dict[str, Backend] = {"FASA auto": "auto", "FASA fastest": "fastest"}


def filled(model: PreTrainedModel, shape: Shape, context: int) -> DynamicCache:
    """A cache of random keys and values for every layer."""
    cache = DynamicCache(config=model.config)
    parameter = next(model.parameters())
    for layer in range(model.config.num_hidden_layers):
        size = (1, shape.kv_heads, context, shape.head_dim)
        key, value = (torch.randn(size, dtype=parameter.dtype, device=parameter.device) for _ in range(2))
        cache.update(key, value, layer)
    return cache


@torch.no_grad()
def measure(model: PreTrainedModel, shape: Shape, context: int) -> dict[str, Any]:
    """Seconds of a step in every variant, at lengths from ``context`` on."""
    layers = model.config.num_hidden_layers
    ways = ["dense", "dense, flash", *FASA] if model.device.type == "cuda" else ["dense", *FASA]
    models = {way: twin(model, layers) for way in ways}
    profile = random_profile(shape, model, layers)
    times: dict[str, list[float]] = {way: [] for way in ways}
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with ExitStack() as stack:
        handles = {
            way: stack.enter_context(enable(models[way], profile, FasaConfig(n_fac=256, backend=backend)))
            for way, backend in FASA.items()
        }
        held = {way: cache_argument(model, filled(model, shape, context)) for way in ways}
        for step in range(WARM + STEPS):
            for way, runs in models.items():
                with ExitStack() as kernels:
                    if way == "dense, flash":
                        kernels.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
                    position = torch.full_like(ids, context + step)
                    synchronize(model.device)
                    begun = time.perf_counter()
                    runs(ids, position_ids=position, **held[way]).logits.argmax(-1)
                    synchronize(model.device)
                    times[way].append(time.perf_counter() - begun)
        sparse = {way: handle.stats.sparse_queries > 0 for way, handle in handles.items()}
    row: dict[str, Any] = {"shape": shape.name, "layers": layers, "batch": 1, "context": context, "ways": []}
    for way, seconds in times.items():
        timing = Timing(tuple(seconds[WARM:]))
        entry = {"name": way, "seconds": timing.median, "quartiles": timing.quartiles(), "steps": STEPS}
        row["ways"].append({**entry, "sparse": sparse.get(way, False)})
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="layers of the model (default: all)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    arguments = parser.parse_args()
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = arguments.layers or shape.layers
    model = shape.model(layers, max(arguments.contexts) + WARM + STEPS, dtype, device).eval()
    head = provenance(command_line("evals.bench.growing"), device)
    ledger = RowLedger(arguments.out / f"growing_{device.type}.json", head, fresh=True)
    for context in arguments.contexts:
        row = measure(model, shape, context)
        ledger.add(row)
        ways = ", ".join(f"{way['name']} {way['seconds'] * 1e3:.1f} ms" for way in row["ways"])
        print(f"{shape.name}, {layers} layers, {context} tokens: {ways}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
