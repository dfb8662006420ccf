"""Part ``prefill``: attention of a whole prompt in one layer, and the time to the first token of a whole model.

Dense attention, the best of PyTorch's kernels and of compiled `flex_attention`, against attention by blocks at several
shares: the whole call, and its estimate, selection and attention apart. Queries and keys are random, so that the blocks
are spread over the whole prompt. The model has random weights; its prefill ends with the logits of the last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from fasa_flex.bench.op import describe
from fasa_flex.bench.record import reason_of
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import Shape, random_chunks, random_profile
from fasa_flex.bench.timing import Timing, free_memory, graphed, interleave, peak_of, time_call
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.model.enable import enable
from fasa_flex.prefill.attention import attend_to_blocks, block_sparse_attention
from fasa_flex.prefill.estimators import Blocks, pooled
from fasa_flex.prefill.grid import BLOCK, Grid
from fasa_flex.prefill.selection import BlockBudget, BlockLists, all_blocks, select_blocks

_MOST = 3  # timed prefills of each kind, after one that warms up


def layers_that_fit(shape: Shape, batch: int, context: int, settings: Settings) -> int:
    """Layers of the model that fit in memory with their cache and the activations of one layer, 0 if none does."""
    item = settings.dtype.itemsize
    activations = batch * context * item * (4 * shape.intermediate + 8 * shape.hidden + 4 * shape.query_heads * 128)
    cache = batch * context * item * 5 * shape.kv_heads * shape.head_dim // 2  # keys, values, room and packed keys
    free = int(0.9 * free_memory(settings.device)) - activations - shape.head_parameters() * item
    fit = free // (shape.layer_parameters() * item + cache)
    return max(0, min(shape.layers, fit, settings.layers or shape.layers))


def bytes_needed(shape: Shape, batch: int, context: int, settings: Settings) -> int:
    """Bytes of the queries, keys, values and results of one call, a copy of each, and the estimate's pieces."""
    heads = 2 * shape.query_heads + 2 * shape.kv_heads
    return 2 * batch * context * heads * shape.head_dim * settings.dtype.itemsize + (1 << 30)


class Prompt:
    """One layer's queries, keys and values of a prompt, [B, H, T, D], normally distributed."""

    def __init__(self, shape: Shape, batch: int, context: int, settings: Settings) -> None:
        device, dtype = settings.device, settings.dtype
        generator = torch.Generator(device).manual_seed(0)
        self.query, self.key, self.value = (
            torch.randn(batch, heads, context, shape.head_dim, generator=generator, device=device, dtype=dtype)
            for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads)
        )
        number = torch.arange(1, context + 1, device=device)[None]
        grid = Grid.of(number, number)
        assert grid is not None
        chunks = DominantChunks.from_chunks(random_chunks(shape, settings.chunks_of(shape), device))
        self.blocks = Blocks(self.query, self.key, chunks, grid, Softmax(shape.head_dim**-0.5))

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, values and the result."""
        return 2 * self.query.nbytes + self.key.nbytes + self.value.nbytes

    def work(self, pairs: int) -> int:
        """Floating-point operations of attention with this many pairs of blocks, of which diagonal ones count half."""
        batch, heads, length, dim = self.query.shape
        diagonal = batch * heads * -(-length // BLOCK)
        return 4 * dim * BLOCK * BLOCK * (2 * pairs - diagonal) // 2

    def sdpa(self, *kernels: SDPBackend) -> Tensor:
        """PyTorch's own attention, by some of its kernels or the one that it chooses."""
        with sdpa_kernel(list(kernels)) if kernels else nullcontext():
            return F.scaled_dot_product_attention(
                self.query, self.key, self.value, is_causal=True, enable_gqa=self.query.shape[1] != self.key.shape[1]
            )

    def by_flex(self) -> Tensor:
        """Compiled `flex_attention` with all blocks up to the diagonal listed."""
        lists = all_blocks(self.blocks.grid, *self.key.shape[:2])
        return attend_to_blocks(self.blocks, lists, self.value, "flex")

    def dense(self) -> dict[str, Callable[[], Tensor]]:
        """Dense attention by name."""
        rivals: dict[str, Callable[[], Tensor]] = {"SDPA": self.sdpa}
        if self.query.is_cuda:
            rivals["SDPA flash"] = functools.partial(self.sdpa, SDPBackend.FLASH_ATTENTION)
            rivals["SDPA cuDNN"] = functools.partial(self.sdpa, SDPBackend.CUDNN_ATTENTION)
            rivals["flex"] = self.by_flex
        return rivals

    def sparse(self, share: float) -> Callable[[], tuple[Tensor, BlockLists]]:
        """Attention by blocks at a share, estimate and selection included."""
        return functools.partial(block_sparse_attention, self.blocks, self.value, BlockBudget(share), pooled)

    def stages(self, share: float) -> dict[str, Callable[[], Any]]:
        """Estimate, selection and attention apart."""
        mass = pooled(self.blocks).flatten(1, 2)
        lists = select_blocks(mass, self.blocks.grid, BlockBudget(share))
        return {
            "estimate": lambda: pooled(self.blocks),
            "select": lambda: select_blocks(mass, self.blocks.grid, BlockBudget(share)),
            "attend": lambda: attend_to_blocks(self.blocks, lists, self.value),
        }


@torch.no_grad()
def measure(
    shape: Shape, batch: int, context: int, settings: Settings, model: PreTrainedModel | None
) -> dict[str, Any]:
    """Measure one row: all rivals at one context and batch.

    Args:
        shape: shape of the model.
        batch: rows.
        context: tokens of the prompt.
        settings: settings of the run.
        model: model for the time to the first token, with as many layers as fit; None: not measured.
    """
    device, prompt = settings.device, Prompt(shape, batch, context, settings)
    names = {f"blocks {share:.0%}": share for share in settings.shares}
    asked: dict[str, Callable[[], Any]] = {**prompt.dense(), **{n: prompt.sparse(s) for n, s in names.items()}}
    calls, errors, left_out = {}, {}, {}
    expected: Tensor | None = None
    for name, call in asked.items():
        try:
            out = call()
        except Exception as error:  # a failing rival must not stop the others
            left_out[name] = reason_of(error)
            continue
        calls[name] = call
        if name not in names:
            expected = out if expected is None else expected
            errors[name] = float((out.float() - expected.float()).norm() / expected.float().norm())
        del out
    del expected
    if not set(calls) - set(names):
        raise RuntimeError(f"no dense attention runs here: {left_out}.")
    times = interleave(calls, device, settings.repeats, settings.seconds)
    best = min((name for name in times if name not in names), key=lambda name: times[name].median)
    every = batch * shape.query_heads * sum(range(1, prompt.blocks.grid.n_keys + 1))
    row: dict[str, Any] = {"shape": shape.name, "batch": batch, "context": context, "n_tip": settings.chunks_of(shape)}
    row |= {"best_dense": best, "left_out": left_out, "rivals": []}
    for name, timing in times.items():
        entry = describe(name, "sparse" if name in names else "dense", timing, times[best], prompt.nbytes)
        pairs, peak = every, peak_of(calls[name], device)
        if name in names:
            pairs = _pairs(calls[name]()[1], prompt, shape)
            entry |= _stages(prompt.stages(names[name]), settings)
        limit = prompt.work(every) / prompt.work(pairs)
        row["rivals"].append(
            entry
            | {
                "timed": "calls",
                "error": errors.get(name),
                "tflop_per_s": prompt.work(pairs) / timing.median / 1e12,
                "block_share": pairs / every,
                "limit": limit,
                "limit_share": entry["speedup"] / limit,
                "memory": {"beyond": peak.bytes, "how": peak.how, "peak": prompt.nbytes + (peak.bytes or 0)},
            }
        )
    row["limit_kind"], row["limit"] = "work", max(rival["limit"] for rival in row["rivals"])
    del prompt, calls, asked
    if model is not None:
        row["first_token"] = first_token(model, shape, batch, context, settings)
    return row


def _pairs(lists: BlockLists, prompt: Prompt, shape: Shape) -> int:
    taken, _ = lists.pairs(prompt.blocks.grid).tolist()
    return int(taken) * shape.query_heads // lists.count.shape[1]


def _stages(calls: Mapping[str, Callable[[], Any]], settings: Settings) -> dict[str, Any]:
    """Seconds of each stage as calls, and of its kernels alone (a CUDA graph), where it can be captured."""
    timed = interleave(calls, settings.device, settings.repeats, settings.seconds / 4)
    seconds = {name: timing.median for name, timing in timed.items()}
    attend = seconds["attend"]
    graphs = (
        {name: graphed(call, settings.device) for name, call in calls.items()} if settings.device.type == "cuda" else {}
    )
    alone = {name: time_call(call, settings.device) for name, (call, how) in graphs.items() if how == "graph"}
    return {
        "stages": seconds,
        "stages_in_graph": alone,
        "estimate_of_attend": (sum(seconds.values()) - attend) / attend,
    }


def first_token(model: PreTrainedModel, shape: Shape, batch: int, context: int, settings: Settings) -> dict[str, Any]:
    """Seconds from a prompt to the logits of its last token, dense and by blocks, on a growing cache."""
    ids = torch.randint(3, shape.vocabulary, (batch, context), device=settings.device)
    layers = len(model.model.layers)
    dense_layers = (0,) if layers == shape.layers > 1 else ()

    def prefill() -> Tensor:
        cache = DynamicCache(config=model.config)
        logits: Tensor = model(ids, logits_to_keep=1, **cache_argument(model, cache)).logits
        return logits

    times: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    profile = random_profile(shape, model, layers)
    for share in (None, *settings.shares):
        name = "dense" if share is None else f"blocks {share:.0%}"
        config = FasaConfig(
            n_tip=settings.chunks_of(shape),
            dense_layers=dense_layers,
            criterion="agreement",
            prefill="blocks",
            prefill_share=share or 1.0,
        )
        try:
            with nullcontext() if share is None else enable(model, profile, config):
                warm = time_call(prefill, settings.device)
                runs = [time_call(prefill, settings.device)]
                while len(runs) < _MOST and warm + sum(runs) < settings.seconds:
                    runs.append(time_call(prefill, settings.device))
            times[name] = runs
        except (RuntimeError, ValueError) as error:  # torch's out-of-memory errors are RuntimeErrors
            left_out[name] = reason_of(error)
    medians = {name: Timing(tuple(each)).median for name, each in times.items()}
    found = {"layers": layers, "full_layers": shape.layers, "dense_layers": list(dense_layers), "left_out": left_out}
    speedups = {name: medians["dense"] / each for name, each in medians.items()} if "dense" in medians else {}
    return {**found, "seconds": medians, "speedup": speedups, "runs": times}
