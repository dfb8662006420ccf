"""`Fasa`, the handle of a model under FASA; `fasa_flex.model.enable.enable` returns it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.backends.triton.dispatch import check_kernels
from fasa_flex.caches.packing import packs
from fasa_flex.calibration.from_prompt import LEAST_KEYS, PromptCalibration
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import Completion as CompletionKind
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.criteria import Criterion
from fasa_flex.core.layer_budgets import spread_budget
from fasa_flex.core.scoring import DominantChunks, Scorer, SequenceScorer, estimates_logits
from fasa_flex.hf.attention_routing import AttentionSeam, implementation_of
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import attention_modules, attention_shape, device_of, maximum_positions
from fasa_flex.model.decode_cache import DecodeCache
from fasa_flex.model.forwards import Forwards
from fasa_flex.model.layer import Layer
from fasa_flex.model.paged_forwards import PagedForwards
from fasa_flex.model.shared import OfOneModel, Shared
from fasa_flex.model.stats import FasaStats, read_share
from fasa_flex.prefill.estimators import BlockEstimator, pooled


class Fasa(OfOneModel):
    """Handle of a model under FASA; `enable` makes it.

    Attributes:
        config: the settings.
        dense_layers: numbers of the layers that stay dense, each with the reason.
        completion: ``config.completion``, or the completion that its None stands for with these scorers.
        packed_dtype: name of the packed keys' precision; None: nothing is packed.
        stats: counts of queries and selected tokens since `enable` or ``stats.reset()``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FasaConfig,
        scorers: dict[int, Scorer | SequenceScorer],
        dense: dict[int, str],
        source: FasaProfile | PromptCalibration | None,
        estimator: BlockEstimator = pooled,
    ) -> None:
        self.config = config
        self.dense_layers = dense
        self._source = source
        source = source if isinstance(source, PromptCalibration) else None
        self._known = {} if source is not None else scorers
        self.completion = _completion_of(config, scorers)
        _check_prefill(config, scorers)
        packing = packs(model) and config.per == "kv_head"
        self.packed_dtype = _packed_dtype_of(model, scorers) if packing else None
        self._model_name = type(model).__name__
        modules = attention_modules(model)
        _, heads, kv_heads, _ = attention_shape(model)
        shard = HeadShard.of(model)
        ranks = (shard.rank, shard.ranks)
        budgets = spread_budget(config.budget, config.layer_budgets, sorted(scorers), kv_heads, ranks)
        devices = [device_of(modules.get(layer, model), model) for layer in range(max(modules) + 1)]
        if config.backend == "triton":
            for layer, scorer in scorers.items():
                check_kernels(devices[layer], layer, scorer, budgets[layer], config, packing, heads // kv_heads)
        self.stats = FasaStats(
            devices,
            {layer: read_share(each, model, config, packing, self.completion) for layer, each in scorers.items()},
            {layer: budget.heads for layer, budget in budgets.items()},
            lambda: self.settings,
            shard.total,
        )
        self._forwards = Forwards(lambda: self._seam.check(), maximum_positions(model))
        self._paged = PagedForwards(config.prefill, lambda: [layer.scorer for layer in self._layers.values()])
        shared = Shared(config, self.completion, packing, source, self._forwards, self.stats, estimator, self._paged)
        self._layers = {
            layer: Layer(
                layer,
                layer == min(modules),
                implementation_of(model, module),
                shared,
                self._known.get(layer),
                budgets.get(layer),
            )
            for layer, module in modules.items()
        }
        functions = {number: layer.attend for number, layer in self._layers.items()}
        self._seam = AttentionSeam(model, functions, owner=f"the open handle {self!r}")
        self._hooks = [
            module.register_forward_pre_hook(self._layers[layer].before, with_kwargs=True)
            for layer, module in modules.items()
        ]
        compiles = bool(scorers) and _have_chunks(scorers) and config.backend not in ("flex", "reference")
        self._decode_cache = DecodeCache(
            model, self._forwards, compiles, shortest=lambda: LEAST_KEYS if self.profile is None else 0
        )
        self._seam.open()  # after the hooks: forwards of other threads are routed from now on
        self._decode_cache.open()

    @property
    def remembers(self) -> bool:
        """Whether the scorer depends on earlier queries, so that a cropped or shared cache cannot be continued."""
        followers = (layer.follower for layer in self._layers.values() if layer.follower is not None)
        return any(getattr(follower, "remembers", True) for follower in followers)

    @property
    def profile(self) -> FasaProfile | None:
        """The profile passed to `enable` or measured on a prompt; None before that, and for other methods."""
        return self._source.profile if isinstance(self._source, PromptCalibration) else self._source

    @property
    def criterion(self) -> Criterion | None:
        """The criterion that chose the chunks; None while there is no profile, and for other methods."""
        chunks = isinstance(next(iter(self._known.values()), None), DominantChunks)
        profile = self.profile if chunks or isinstance(self._source, PromptCalibration) else None
        return None if profile is None else profile.criterion(self.config.criterion)

    @property
    def settings(self) -> dict[str, str | None]:
        """Criterion, packed dtype and completion in use, with every None of the config resolved."""
        return {name: getattr(self, name) for name in ("criterion", "packed_dtype", "completion")}

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed keys beside the paged caches of continuous batching; 0 without a manager that runs."""
        return self._paged.n_bytes

    def recalibrate(self) -> None:
        """Discard the chunks measured on a prompt; all attention is dense until the next long prompt.

        Raises:
            ValueError: `enable` was given a profile or a scorer.
        """
        if not isinstance(self._source, PromptCalibration):
            raise ValueError("enable was given a profile or a scorer; only enable(model) calibrates on prompts.")
        self._source.forget()

    def disable(self) -> None:
        """Restore the model's own attention; its outputs are then bit-identical to those before `enable`.

        If another thread is in `generate`, the rest of its answer uses dense attention; this method warns of it and
        counts the answer in ``stats.interrupted``.
        """
        if self._seam.is_open:
            interrupted = self._forwards.interrupted()
            if interrupted:
                self.stats.interrupted += interrupted
                several = "s generate, whose answers are" if interrupted > 1 else " generates, whose answer is"
                warnings.warn(
                    f"{self!r} is disabled while {interrupted} other thread{several} dense from here on; "
                    "wait for generation to end first.",
                    stacklevel=2,
                )
        self._decode_cache.close()
        self._seam.close()
        for hook in self._hooks:
            hook.remove()
        self._paged.clear()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"Fasa({self._model_name}, n_fac={self.config.n_fac}, {settings})"

    def __enter__(self) -> Fasa:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @contextmanager
    def sparse_from(self, start: Tensor, stop: Tensor | None = None) -> Iterator[None]:
        """State where the prompt ends, so that one forward of many tokens equals token-by-token sparse decoding.

        Inside the context it holds for every forward of this thread. Slots count from the first key of the cache,
        padding included.

        Args:
            start: int64 [B] or [1]: queries of row b at slots >= start[b] are sparse, earlier queries are dense.
            stop: int64 in the shape of ``start``: queries at slots >= stop[b] are padding and are not counted; None: no
                padding.

        Raises:
            ValueError: ``start`` or ``stop`` has another shape, dtype or batch size, or is negative.
        """
        self._check_open()
        with self._forwards.sparse_from(start, stop):
            yield

    def _check_open(self) -> None:
        if not self._seam.is_open:
            raise ValueError(f"{self!r} was disabled, so the model is dense; call enable(...) again for a new handle.")


def _packed_dtype_of(model: PreTrainedModel, scorers: dict[int, Scorer | SequenceScorer]) -> str | None:
    """Name of the precision of packed keys in the sparse layers; None: no scorer is `DominantChunks`."""
    for scorer in scorers.values():
        if isinstance(scorer, DominantChunks):
            return scorer.dtype or str(model.dtype).removeprefix("torch.")
    return None


def _check_prefill(config: FasaConfig, scorers: dict[int, Scorer | SequenceScorer]) -> None:
    """Refuse a prefill by blocks with scorers that have no dominant chunks to estimate from.

    Raises:
        ValueError: ``config.prefill`` is "blocks" and a scorer is no `DominantChunks`.
    """
    others = [type(scorer).__name__ for scorer in scorers.values() if not isinstance(scorer, DominantChunks)]
    if config.prefill == "blocks" and others:
        raise ValueError(
            f"prefill='blocks' estimates attention from the dominant chunks of a profile, which {others[0]} has not; "
            "use prefill='dense'."
        )


def _completion_of(config: FasaConfig, scorers: dict[int, Scorer | SequenceScorer]) -> CompletionKind:
    """Resolve ``config.completion`` for the scorers of the sparse layers.

    Raises:
        ValueError: the config sets a completion and the scores do not estimate logits.
    """
    able = all(map(estimates_logits, scorers.values()))
    if config.completion in ("first_order", "mean") and not able:
        other = next(type(scorer).__name__ for scorer in scorers.values() if not estimates_logits(scorer))
        raise ValueError(
            f"completion={config.completion!r} needs scores that estimate logits, which {other} does not give; "
            "use completion=None or 'none'."
        )
    # without one chunk set per key/value head no layer keeps a state: completion would read all keys and values
    keeps = _have_chunks(scorers) and config.per == "kv_head"
    return config.completion or ("first_order" if keeps else "none")


def _have_chunks(scorers: dict[int, Scorer | SequenceScorer]) -> bool:
    """Whether the scorers of all sparse layers are of dominant chunks."""
    return all(isinstance(scorer, DominantChunks) for scorer in scorers.values())
