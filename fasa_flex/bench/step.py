"""Part ``step``: a whole decode step of a model with random weights, under dense attention and under FASA.

All rivals use the same weights, keys and values. Each one sets the cache's counters back and decodes the last token of
the context, in a cache of exactly that length. (The context is one token shorter if a block of 64 would end with it.)
All slots are valid, so dense rivals attend without a mask; one rival is transformers' own attention. If the model does
not fit, it is cut to its first layers, which the row records, and the whole model's time is projected from a layer's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from fasa_flex.bench import caches, op, rivals
from fasa_flex.bench.launches import launches_of
from fasa_flex.bench.limits import amdahl, project
from fasa_flex.bench.record import reason_of
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import Shape, random_profile
from fasa_flex.bench.timing import free_memory, graphed, interleave, peak_of
from fasa_flex.bench.variants import Variant, config_of, variants
from fasa_flex.caches.fasa_cache import FasaCache
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.completion import BLOCK
from fasa_flex.core.config import FasaConfig
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.model.enable import enable
from fasa_flex.model.handle import Fasa

_SHARE_OF_MEMORY = 0.8
_HEAD = "(final norm and output head)"
_COMPILATIONS = 256


def layers_that_fit(shape: Shape, batch: int, context: int, settings: Settings) -> int:
    """Number of the shape's layers that fit in memory with their caches, 0 if none does; call it before building."""
    item = settings.dtype.itemsize
    buffers = op.bytes_needed(shape, batch, context, settings)
    if settings.device.type == "cpu":
        buffers *= 2  # FASA-M's host memory is the same memory; dense and FASA-C share keys and values
    repeated = 2 * batch * context * shape.query_heads * shape.head_dim * item  # transformers' keys by query head
    spare = shape.head_parameters() * item + 2 * buffers + repeated
    free = int(_SHARE_OF_MEMORY * free_memory(settings.device)) - spare
    fit = free // (shape.layer_parameters() * item + buffers)
    return max(0, min(shape.layers, fit, settings.layers or shape.layers))


def twin(model: PreTrainedModel, layers: int, attention: str = "sdpa") -> PreTrainedModel:
    """A second model of the first ``layers`` layers, on the same weights, with its own attention implementation."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.model.layers = other.model.layers[:layers]
    other.config.num_hidden_layers = layers
    if getattr(other.config, "layer_types", None):
        other.config.layer_types = other.config.layer_types[:layers]
    other.set_attn_implementation(attention)
    return other


class Stage:
    """One row's buffers, and the decode step of each variant on them."""

    def __init__(
        self, model: PreTrainedModel, shape: Shape, batch: int, context: int, layers: int, settings: Settings
    ) -> None:
        self.model, self.shape, self.layers, self.settings = model, shape, layers, settings
        # every BLOCK-th token also updates the completion's state; that step is not measured
        self.batch, self.context = batch, context - (context % BLOCK == 0)
        default = (0,) if 1 < layers == shape.layers else ()
        self.dense_layers = default if settings.dense_layers is None else settings.dense_layers
        self.caches: dict[str, Any] = {}
        self.enabled: dict[str, Fasa] = {}
        self._profile: FasaProfile | None = None

    def step(self, variant: Variant, stack: ExitStack) -> Callable[[], Tensor]:
        """The decode step of a variant, usable until ``stack`` closes."""
        model = twin(self.model, self.layers, variant.attention)
        cache = self._cache(variant, model)
        self.caches[variant.name] = cache
        if variant.kind == "sparse":
            fasa = enable(model, self.profile(model), self._config(variant))
            self.enabled[variant.name] = stack.enter_context(fasa)
        ids = torch.ones(self.batch, 1, dtype=torch.long, device=self.settings.device)
        positions = torch.full_like(ids, self.context - 1)

        def decode(run: Callable[..., Any]) -> Tensor:
            caches.rewind(cache, self.context - 1)
            caches.forget(cache, variant.new_rows)
            logits: Tensor = run(ids, position_ids=positions, **cache_argument(model, cache)).logits
            return logits

        if not variant.compiled:
            return lambda: decode(model)
        decode(model)  # keeps the cache's first-use initialisation out of the graph
        compiled: Callable[..., Any] = torch.compile(model, fullgraph=True, dynamic=False)
        return lambda: decode(compiled)

    def profile(self, model: PreTrainedModel) -> FasaProfile:
        """A random profile, the same for all variants."""
        if self._profile is None:
            self._profile = random_profile(self.shape, model, self.layers)
        return self._profile

    def _cache(self, variant: Variant, model: PreTrainedModel) -> Any:
        """A cache for one variant, which shares keys and values with the other variants in the same memory."""
        settings, length = self.settings, self.context
        cache: Any
        if variant.kind == "dense":
            cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            config = self._config(variant)
            placement: Any = variant.placement
            with warnings.catch_warnings():  # FASA-M saves nothing on a CPU, but its cost is measured
                warnings.simplefilter("ignore")
                cache = FasaCache(model, self.profile(model), config, placement=placement, max_cache_len=length)
        if any(caches.share(cache, other, length) for other in self.caches.values()):
            return cache
        caches.fill(cache, self.layers, self.shape, self.batch, length - 1, settings.dtype, settings.device)
        return cache

    def _config(self, variant: Variant) -> FasaConfig:
        return config_of(variant, self.settings, self.dense_layers)


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=_COMPILATIONS)
def measure(
    shape: Shape, batch: int, context: int, settings: Settings, model: PreTrainedModel, layers: int
) -> dict[str, Any]:
    """Measure one row: a decode step of ``layers`` layers of ``model`` at one context and batch, in every variant."""
    eager = replace(settings, modes=("eager",), seconds=settings.seconds / 4)
    attention = op.measure(shape, batch, context, eager, rivals.dense_rivals(eager), {})
    alone = next(entry for entry in attention["rivals"] if entry["name"] == attention["best_dense"])
    stage = Stage(model, shape, batch, context, layers, settings)
    with ExitStack() as stack:
        # sparse variants first: dense ones then share the keys and values of their cache
        ordered = sorted(
            variants(settings), key=lambda variant: (variant.backend == "fastest", variant.kind != "sparse")
        )
        steps, errors, left_out = _warmed(stage, ordered, stack)
        hidden = torch.randn(batch, 1, shape.hidden, dtype=settings.dtype, device=settings.device)
        steps[_HEAD] = lambda: model.lm_head(model.model.norm(hidden))
        timed = {name: graphed(step, settings.device) for name, step in steps.items()}
        calls = {name: call for name, (call, _) in timed.items()}
        times = interleave(calls, settings.device, settings.repeats, settings.seconds)
        beyond = {name: peak_of(step, settings.device) for name, step in steps.items()}
        measured = calls if settings.device.type == "cuda" else {}
        launched = {name: launches_of(call, settings.device) for name, call in measured.items()}
    by_name = {variant.name: variant for variant in ordered}
    head = times.pop(_HEAD).median
    best = min((name for name in times if by_name[name].kind == "dense"), key=lambda name: times[name].median)
    weights = (layers * shape.layer_parameters() + shape.head_parameters()) * settings.dtype.itemsize
    read_weights = shape.read_parameters(layers) * settings.dtype.itemsize
    sparse_layers = layers - len(set(stage.dense_layers) & set(range(layers)))
    reads, limit = attention["reads"], attention["limit"]
    share = alone["seconds"] * layers / times[best].median
    row: dict[str, Any] = {
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "n_tip": settings.chunks_of(shape),
        "n_fac": settings.n_fac,
        "layers": layers,
        "full_layers": shape.layers,
        "dense_layers": list(stage.dense_layers),
        "weights": weights,
        "limit": limit,
        "attention": {"name": alone["name"], "seconds_a_layer": alone["seconds"], "share_of_step": share},
        "head_seconds": head,
        "ceiling": amdahl(times[best].median, alone["seconds"] * layers, limit, sparse_layers / layers),
        "best_dense": best,
        "left_out": left_out,
        "rivals": [],
    }
    for name, timing in times.items():
        variant = by_name[name]
        sparse = sparse_layers if name in stage.enabled and stage.enabled[name].stats.sparse_queries else 0
        read = read_weights + sparse * reads["sparse"] + (layers - sparse) * reads["dense"]
        cache_bytes = caches.nbytes(stage.caches[name])
        on_device = cache_bytes.get(settings.device.type, 0)
        extra = beyond[name]
        entry = op.describe(name, variant.kind, timing, times[best], read)
        entry |= {
            "tokens_per_s": batch / timing.median,
            "timed": timed[name][1],
            "error": errors[name],
            "memory": {
                "weights": weights,
                "cache": cache_bytes,
                "beyond": extra.bytes,
                "how": f"bytes of weights and cache tensors, and {extra.how} during a step",
                "peak": weights + on_device + (extra.bytes or 0),
            },
            "projected": project(timing.median, times[best].median, head, batch, (layers, shape.layers), sparse > 0),
        }
        if variant.kind == "sparse":
            entry["ceiling_share"] = entry["speedup"] / row["ceiling"]
        if name in launched:
            entry["launches"] = launched[name]
        row["rivals"].append(entry)
    return row


def _warmed(
    stage: Stage, wanted: list[Variant], stack: ExitStack
) -> tuple[dict[str, Callable[[], Any]], dict[str, float], dict[str, str]]:
    """The steps that run and agree with the first of their kind, their errors, and the reasons against the others."""
    steps: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    first: dict[str, Tensor] = {}
    for variant in wanted:
        try:
            step = stage.step(variant, stack)
            logits = step().float()
        except Exception as error:  # a failing variant must not stop the others
            left_out[variant.name] = reason_of(error)
            continue
        first.setdefault(variant.kind, logits)
        alike = first.values() if variant.backend == "fastest" else [first[variant.kind]]  # "fastest" may be dense
        wrong = min(float((logits - expected).norm() / expected.norm()) for expected in alike)
        slack = 10 if variant.kind == "sparse" else 1  # rounding may select other keys in near ties
        if wrong <= slack * op.TOLERANCE[stage.settings.dtype] * stage.layers**0.5:  # errors add up over layers
            steps[variant.name], errors[variant.name] = step, wrong
        else:
            left_out[variant.name] = f"differs from the first {variant.kind} step by {wrong:.2g} of its norm"
    if "dense" not in first:
        raise RuntimeError(f"no dense step runs here: {left_out}.")
    return steps, errors, left_out


def plan(shape: Shape, settings: Settings) -> Mapping[tuple[int, int], int]:
    """Number of layers for every (batch, context); call it before the model exists."""
    return {
        (batch, context): layers_that_fit(shape, batch, context, settings)
        for batch in settings.batches
        for context in settings.contexts
    }
