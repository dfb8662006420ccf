"""Part ``serve``: a trace of long prompts by transformers' continuous batching, under dense attention and under FASA.

All requests of a row arrive at once. Their prompts are random tokens, between half of the row's context and the whole;
every second prompt begins with the same quarter of a context, which later requests find in the cache. Weights are
random, so that a run measures no quality. Dense attention and FASA take turns in one process, each with a new manager.
Where no flash attention is installed, transformers' dense decoding reads all requests' keys under one mask and lists an
index for every cached token in Python; so a row also has a bound for any dense attention, by the bytes that it reads.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import Shape, random_profile
from fasa_flex.bench.timing import bandwidth
from fasa_flex.core.config import FasaConfig
from fasa_flex.errors import StateError
from fasa_flex.model.enable import enable

ROUNDS = 3
"""Most rounds of a row."""

IN_GRAPHS = "FASA, CUDA graphs"
"""Name of the way whose steps of decoding are CUDA graphs; the row's speedups are its, where it runs."""

BOUND = "any dense attention, at most"
"""Name of the bound in tables."""

_WAIT = 1800.0  # seconds for one request


def trace(context: int, requests: int, new_tokens: int, vocabulary: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts and numbers of new tokens.

    Args:
        context: tokens of the longest prompt; the shortest has half of them.
        requests: number of requests.
        new_tokens: most new tokens of a request; the fewest are half of them.
        vocabulary: tokens of the model.
        seed: of the random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(vocabulary, (context // 4,), generator=generator)
    found = []
    for number in range(requests):
        share = 0.5 + 0.5 * number / max(1, requests - 1)
        length, new = max(2, round(share * context)), max(2, round((1.5 - share) * new_tokens))
        prompt = torch.randint(vocabulary, (length,), generator=generator)
        if number % 2:
            prompt[: min(len(shared), length - 1)] = shared[: length - 1]
        found.append((prompt.tolist(), new))
    return found


def measure(
    shape: Shape,
    requests: int,
    context: int,
    settings: Settings,
    model: PreTrainedModel,
    layers: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Measure one row: ``requests`` requests in flight with prompts of up to ``context`` tokens."""
    asked = trace(context, requests, new_tokens, shape.vocabulary)
    page = 256 if context >= 2048 else 32
    blocks = sum(-(-(len(prompt) + new) // page) + 1 for prompt, new in asked)
    dense_layers = (0,) if settings.dense_layers is None and layers == shape.layers else settings.dense_layers or ()
    config = FasaConfig(
        n_tip=FasaConfig.n_tip if settings.n_tip is None else settings.n_tip,
        n_fac=settings.n_fac,
        group_reduce=settings.group_reduce,
        packed_dtype=settings.packed_dtype,
        completion=settings.completion,
        dense_layers=dense_layers,
    )
    profile = random_profile(shape, model, layers)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "dense": nullcontext,
        "FASA": lambda: enable(model, profile, config),
    }
    if settings.device.type == "cuda":
        ways[IN_GRAPHS] = ways["FASA"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    short = trace(min(context, 2048), requests, 6, shape.vocabulary)
    for name, way in ways.items():  # compiles the kernels, which differ by the number of requests
        with way() as handle:
            how = {"tables": handle is not None, "graphs": name == IN_GRAPHS}
            _answer(model, short, page, blocks, settings.device, **how)
    begun = time.monotonic()
    for turn in range(min(ROUNDS, settings.repeats)):
        for name in sorted(ways, reverse=bool(turn % 2)):
            with ways[name]() as handle:
                how = {"tables": handle is not None, "graphs": name == IN_GRAPHS}
                run = _answer(model, asked, page, blocks, settings.device, **how)
                if handle is not None:
                    run |= {"sparse_queries": handle.stats.sparse_queries, "dense_queries": handle.stats.dense_queries}
            runs[name].append(run)
        if time.monotonic() - begun > settings.seconds:
            break
    rivals = [{"name": name, **_summary(runs[name])} for name in ways]
    dense, fasa = rivals[0], rivals[-1]
    return {
        "shape": shape.name,
        "batch": requests,
        "context": context,
        "layers": layers,
        "full_layers": shape.layers,
        "prompt_tokens": [len(prompt) for prompt, _ in asked],
        "new_tokens": [new for _, new in asked],
        "page": page,
        "blocks": blocks,
        "config": config.to_dict(),
        "rivals": rivals,
        "decode_speedup": fasa["decode_tokens_per_s"] / dense["decode_tokens_per_s"],
        "speedup": fasa["tokens_per_s"] / dense["tokens_per_s"],
        "dense_bound_tokens_per_s": _dense_bound(shape, layers, model, asked, settings.device),
    }


def _dense_bound(
    shape: Shape, layers: int, model: PreTrainedModel, asked: Sequence[tuple[list[int], int]], device: torch.device
) -> float:
    """Tokens a second of decoding that only reads weights, keys and values, at the rate of a copy.

    Each request has its prompt and half of its new tokens in the cache.
    """
    read, embedded = sum(each.nbytes for each in model.parameters()), model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedded:  # of which a step reads a row for each token
        read -= embedded.nbytes
    tokens = sum(len(prompt) + new / 2 for prompt, new in asked)
    states = tokens * layers * shape.kv_heads * 2 * shape.head_dim * model.dtype.itemsize
    return len(asked) * bandwidth(device)["copy"] * 1e9 / float(read + states)


def _answer(
    model: PreTrainedModel,
    asked: Sequence[tuple[list[int], int]],
    page: int,
    blocks: int,
    device: torch.device,
    tables: bool = False,
    graphs: bool = False,
) -> dict[str, Any]:
    """Answer all requests by one manager; returns what `_summary` summarises.

    Args:
        model: the model.
        asked: prompts and numbers of new tokens.
        page: tokens of a block.
        blocks: blocks of the cache.
        device: the model's.
        tables: whether decoding reads tables of blocks instead of an index for every cached token.
        graphs: whether steps of decoding with tables are CUDA graphs.

    Raises:
        RuntimeError: a request failed.
    """
    parameters = inspect.signature(ContinuousBatchingConfig).parameters
    sizes: dict[str, Any] = {"page_size" if "page_size" in parameters else "block_size": page, "num_blocks": blocks}
    batching = ContinuousBatchingConfig(
        **sizes, max_batch_tokens=2048, use_cuda_graph=(False, graphs), use_async_batching=False
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    if tables:  # otherwise transformers makes them for flash attention alone
        longest = max(len(prompt) + new for prompt, new in asked)
        manager.continuous_batching_config.max_blocks_per_request = -(-longest // page) + 1
    manager.start()
    try:
        begun = time.perf_counter()
        for number, (prompt, new) in enumerate(asked):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=new, record_timestamps=True)
        results: dict[str, Any] = {}
        while len(results) < len(asked):
            result = manager.get_result(timeout=_WAIT)
            if result is None or result.error is not None:
                raise StateError(f"a request failed: {result and result.error}")
            if result.is_finished():
                results[result.request_id] = result
        seconds = time.perf_counter() - begun
    finally:
        manager.stop(block=True)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    times = [[at - begun for at in each.timestamps] for each in results.values()]
    return {"seconds": seconds, "peak_bytes": peak, "times": times}


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over runs: throughput, and median and 95th percentile of the times of tokens, in seconds."""
    first = [times[0] for run in runs for times in run["times"]]
    between = [b - a for run in runs for times in run["times"] for a, b in pairwise(times)]
    kept: dict[str, Any] = {
        key: runs[-1][key] for key in ("peak_bytes", "sparse_queries", "dense_queries") if key in runs[-1]
    }
    return {
        "rounds": len(runs),
        "requests_per_s": statistics.median(len(run["times"]) / run["seconds"] for run in runs),
        "tokens_per_s": statistics.median(sum(map(len, run["times"])) / run["seconds"] for run in runs),
        "decode_tokens_per_s": statistics.median(_decoding(run["times"]) for run in runs),
        "first_token_s": {"median": statistics.median(first), "p95": _percentile(first)},
        "token_s": {"median": statistics.median(between), "p95": _percentile(between)},
        **kept,
    }


def _decoding(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all requests decode; where there is no such time, from the first token to the last."""
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    if end <= begin:
        begin, end = min(each[0] for each in times), max(each[-1] for each in times)
    count = sum(begin < time <= end for each in times for time in each)
    return count / (end - begin)


def _percentile(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    parts = [
        f"{rival['name']} {rival['tokens_per_s']:.3g} tokens/s, while all decode {rival['decode_tokens_per_s']:.3g}, "
        f"first token after {rival['first_token_s']['median']:.3g} s"
        for rival in row["rivals"]
    ]
    where = f"{row['shape']}, {row['batch']} requests, prompts of up to {row['context']} tokens"
    return f"{where}: {'; '.join(parts)}; decoding {row['decode_speedup']:.2f}x"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of all rows."""
    head = "| shape | layers | requests | prompts | way | requests/s | tokens/s | decoding tokens/s | first token s"
    lines = [f"{head} (p95) | token ms (p95) | memory GB |", "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        for rival in row["rivals"]:
            speeds = [rival[key] for key in ("requests_per_s", "tokens_per_s", "decode_tokens_per_s")]
            first, token = rival["first_token_s"], {key: 1e3 * each for key, each in rival["token_s"].items()}
            peak = rival.get("peak_bytes")
            cells = [row[key] for key in ("shape", "layers", "batch", "context")] + [rival["name"]]
            cells += [f"{speed:.3g}" for speed in speeds]
            cells += [f"{each['median']:.3g} ({each['p95']:.3g})" for each in (first, token)]
            lines.append(f"| {' | '.join(map(str, cells))} | {'-' if peak is None else f'{peak / 1e9:.3g}'} |")
        if (bound := row.get("dense_bound_tokens_per_s")) is not None:
            cells = [row[key] for key in ("shape", "layers", "batch", "context")] + [BOUND, "-", "-", f"{bound:.3g}"]
            lines.append(f"| {' | '.join(map(str, cells))} | - | - | - |")
    return "\n".join(lines)
