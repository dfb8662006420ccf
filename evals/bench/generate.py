"""Seconds of a token in `generate`, on a growing cache (its default) and on a static one (with compilation).

    python -m evals.bench.generate --out runs          # on CUDA

The time of a token is the difference between a long and a short answer, divided by their tokens, so that prefill and
compilation cancel. Each answer is generated twice, since cuDNN plans new lengths at the first time. The variants run in
turns. The model has Llama-3.1-8B's shape and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fasa_flex.bench.record import RowLedger, command_line, provenance
from fasa_flex.bench.shapes import SHAPES, random_profile
from fasa_flex.bench.step import twin
from fasa_flex.bench.timing import synchronize
from fasa_flex.core.config import Backend, FasaConfig
from fasa_flex.model.enable import enable

SHAPE = SHAPES["llama-3.1-8b"]
SHORT, LONG, REPEATS = 8, 108, 5
WAYS: dict[str, Backend | None] = {"dense": None, "FASA auto": "auto", "FASA fastest": "fastest"}
CACHES: dict[str, dict[str, Any]] = {"growing": {}, "static": {"cache_implementation": "static"}}


def seconds_a_token(model: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> float:
    """Seconds of one token in greedy decoding."""

    def answer(length: int) -> float:
        synchronize(model.device)
        begun = time.perf_counter()
        model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False, **options)
        synchronize(model.device)
        return time.perf_counter() - begun

    seconds = [answer(length) for length in (LONG, LONG, SHORT, SHORT)]  # the first may compile or plan
    return (seconds[1] - seconds[3]) / (LONG - SHORT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--layers", type=int, default=8, help="layers, of the model's 32")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():  # transformers compiles on CUDA only
        print("it needs a CUDA device.", file=sys.stderr)
        return 1
    device, layers, context = torch.device("cuda"), arguments.layers, arguments.context
    base = SHAPE.model(layers, context + LONG, torch.bfloat16, device).eval()
    profile = random_profile(SHAPE, base, layers)
    prompt = torch.randint(0, SHAPE.vocabulary, (1, context), device=device)
    head = provenance(command_line("evals.bench.generate"), device)
    ledger = RowLedger(arguments.out / "generate_cuda.json", head, fresh=True)
    for cache, options in CACHES.items():
        torch._dynamo.reset()
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        with ExitStack() as stack:
            models = {way: twin(base, layers) for way in WAYS}
            for way, backend in WAYS.items():
                if backend is not None:
                    stack.enter_context(enable(models[way], profile, FasaConfig(n_fac=256, backend=backend)))
            for repeat in range(1 + REPEATS):
                for way, model in models.items():
                    seconds = seconds_a_token(model, prompt, options)
                    if repeat:
                        times[way].append(seconds)
        for way, found in times.items():
            row = {"shape": SHAPE.name, "layers": layers, "batch": 1, "context": context, "cache": cache, "name": way}
            ledger.add({**row, "seconds": statistics.median(found), "all_seconds": found})
            print(f"{cache} cache, {way}: {statistics.median(found) * 1e3:.2f} ms a token", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
