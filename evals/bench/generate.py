"""Seconds of a token in `generate` by cache, what compiling takes at first, and after how many tokens it has paid.

    python -m evals.bench.generate --out runs          # on CUDA, five to seven minutes

"growing" names the cache that grows and "static" the static one, which transformers compiles; "plain" names none. With
FASA the plain call then takes a static one, because its answer may have `BREAK_EVEN` tokens; without FASA it is
"growing". The time of a token is the difference between a long and a short answer, divided by their tokens, so that
prefill and compilation cancel. Each answer is generated twice, since cuDNN plans new lengths at the first time.
Compiling takes the difference between the first answer of all and its repetition; nothing compiled is read from disk.
The variants run in turns. The model has Llama-3.1-8B's shape and random weights.

At last prompts of other lengths follow in "plain": the second length compiles once more, the third must not.
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
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from fasa_flex.bench.record import RowLedger, command_line, provenance
from fasa_flex.bench.shapes import SHAPES, random_profile
from fasa_flex.bench.step import twin
from fasa_flex.bench.timing import synchronize
from fasa_flex.core.config import Backend, FasaConfig
from fasa_flex.model.decode_cache import BREAK_EVEN
from fasa_flex.model.enable import enable

SHAPE = SHAPES["llama-3.1-8b"]
SHORT, LONG, REPEATS = 8, 108, 5
WAYS: dict[str, Backend | None] = {"dense": None, "FASA auto": "auto", "FASA fastest": "fastest"}
CACHES: dict[str, dict[str, Any]] = {
    "growing": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "plain": {"max_new_tokens": BREAK_EVEN},
}


def answer(model: PreTrainedModel, prompt: torch.Tensor, length: int, options: dict[str, Any]) -> torch.Tensor:
    """Greedy tokens [1, length]; ``options`` may allow for more."""
    end = prompt.shape[1] + length
    stops = [lambda written, scores: torch.full((1,), written.shape[1] >= end, device=written.device)]
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "stopping_criteria": stops}
    out: torch.Tensor = model.generate(prompt, **{**settings, **options})
    return out[:, prompt.shape[1] :]


def seconds_of_answers(model: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> list[float]:
    """Seconds of two long answers and of two short ones; the first of a length may compile or plan."""
    seconds = []
    for length in (LONG, LONG, SHORT, SHORT):
        synchronize(model.device)
        begun = time.perf_counter()
        answer(model, prompt, length, options)
        synchronize(model.device)
        seconds.append(time.perf_counter() - begun)
    return seconds


def seconds_a_token(seconds: list[float]) -> float:
    """Seconds of one token, of `seconds_of_answers`."""
    return (seconds[1] - seconds[3]) / (LONG - SHORT)


def paid_after(rows: list[dict[str, Any]], name: str, cache: str) -> float | None:
    """Tokens after which compiling for ``cache`` has saved as much time as it took; None if it saves none."""
    row, growing = (next(r for r in rows if (r["name"], r["cache"]) == (name, kind)) for kind in (cache, "growing"))
    saved = growing["seconds"] - row["seconds"]
    return float(row["compile_seconds"] / saved) if saved > 0 else None


def other_lengths(model: PreTrainedModel, prompt: torch.Tensor) -> list[dict[str, Any]]:
    """Two prompts of other lengths: seconds of two long answers, graphs so far, first tokens as on a growing cache."""
    found = []
    for context in (prompt.shape[1] // 4, prompt.shape[1] // 2):
        part = prompt[:, :context]
        seconds = seconds_of_answers(model, part, CACHES["plain"])
        tokens, grown = (answer(model, part, LONG, CACHES[cache]) for cache in ("plain", "growing"))
        same = int((tokens == grown).int().cumprod(1).sum())
        graphs = counters["stats"]["unique_graphs"]
        found.append({"context": context, "seconds": seconds[:2], "graphs": graphs, "same_tokens": same})
    return found


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
    base = SHAPE.model(layers, context + BREAK_EVEN, torch.bfloat16, device).eval()
    profile = random_profile(SHAPE, base, layers)
    prompt = torch.randint(0, SHAPE.vocabulary, (1, context), device=device)
    head = provenance(command_line("evals.bench.generate"), device)
    ledger = RowLedger(arguments.out / "generate_cuda.json", head, fresh=True)
    torch._inductor.config.force_disable_caches = True
    for cache, options in CACHES.items():
        torch._dynamo.reset()
        counters.clear()
        ways = [way for way in WAYS if cache != "plain" or WAYS[way] is not None]
        times: dict[str, list[float]] = {way: [] for way in ways}
        first: dict[str, float] = {}
        lengths: dict[str, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            models = {way: twin(base, layers) for way in ways}
            for way in ways:
                backend = WAYS[way]
                if backend is not None:
                    stack.enter_context(enable(models[way], profile, FasaConfig(n_fac=256, backend=backend)))
            for repeat in range(1 + REPEATS):
                for way, model in models.items():
                    seconds = seconds_of_answers(model, prompt, options)
                    if repeat:
                        times[way].append(seconds_a_token(seconds))
                    else:
                        first[way] = seconds[0] - seconds[1]
            if cache == "plain":
                lengths = {"FASA auto": other_lengths(models["FASA auto"], prompt)}
        skipped = counters["inductor"]["cudagraph_skips"]
        for way, found in times.items():
            row = {"shape": SHAPE.name, "layers": layers, "batch": 1, "context": context, "cache": cache, "name": way}
            row |= {"seconds": statistics.median(found), "all_seconds": found, "compile_seconds": first[way]}
            row |= {"graphs_skipped": skipped, "other_lengths": lengths.get(way, [])}
            paid = paid_after([*ledger.rows, row], way, cache)
            ledger.add({**row, "paid_after_tokens": paid})
            more = "" if paid is None else f", {first[way]:.1f} s at first, paid after {paid:.0f} tokens"
            print(f"{cache} cache, {way}: {row['seconds'] * 1e3:.2f} ms a token{more}", flush=True)
            print(*row["other_lengths"], sep="\n", end="\n" if row["other_lengths"] else "", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
