"""FASA inside a Hugging Face model: `enable` routes its attention through TIP and FAC, one reversible line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from fasa_flex.attention import sparse_attention
from fasa_flex.boundary import Boundary
from fasa_flex.config import FasaConfig, GroupReduce
from fasa_flex.crossover import sparse_is_faster
from fasa_flex.layers import (
    attention_modules,
    attention_shape,
    check_supported,
    dense_layers,
    layer_of,
    maximum_positions,
)
from fasa_flex.masking import DecodeStep, Once, count_valid, valid_from_mask
from fasa_flex.packed_layers import pack_layer, packed_keys, packs
from fasa_flex.packing import PackedKeys, packed_bytes
from fasa_flex.profile import FasaProfile
from fasa_flex.reads import ReadShare, StatesReads
from fasa_flex.scoring import DominantChunks, Forward, Given, Scorer, SequenceScorer
from fasa_flex.seam import AttentionResult, AttentionSeam, DenseAttention
from fasa_flex.softmax import Softmax
from fasa_flex.spread import spread_budget
from fasa_flex.stats import FasaStats, tally

ScorerFactory = Callable[[int], Scorer | SequenceScorer]
"""Makes the scorer of one layer."""

_SCORE_BYTES = 1 << 27


def enable(
    model: PreTrainedModel,
    profile: FasaProfile | None,
    config: FasaConfig | None = None,
    *,
    scorer: ScorerFactory | None = None,
) -> Fasa:
    """Let ``model`` decode with frequency-aware sparse attention, until `Fasa.disable`.

    The model attends densely in the prefill, in ``config.dense_layers``, and in layers without RoPE or with a sliding
    window (`Fasa.dense_layers` tells which and why); every query decoded after the prefill selects its own ``n_fac``
    keys elsewhere. Nothing is evicted from the cache. Nothing is patched: the attention function is registered under a
    name of its own and set in this model's config, so that models with different profiles and budgets live side by
    side.

    Args:
        model: a transformers model with attention implementation "sdpa" or "eager".
        profile: from `calibrate`; may be None where ``scorer`` needs none.
        config: budget and options; None is `FasaConfig`'s defaults.
        scorer: another method than FASA: makes the scorer of a layer.

    Returns:
        a handle with ``stats`` and ``disable()``; also a context manager that disables at its end.

    Raises:
        ValueError: the profile does not fit the model, with the reason, or settings that this model cannot take.
    """
    check_supported(model)
    config = FasaConfig() if config is None else config
    if profile is not None:
        profile.check_fits(model)
    dense = dense_layers(model, config.dense_layers, () if profile is None else profile.layout.unrotated_layers)
    make = scorer or _dominant_chunks(model, profile, config)
    layers = sorted(attention_modules(model))
    if not set(layers) - set(dense):
        warnings.warn(f"every layer of {type(model).__name__} stays dense ({dense}): nothing is sparse.", stacklevel=2)
    return Fasa(model, config, {layer: make(layer) for layer in layers if layer not in dense}, dense)


def _dominant_chunks(model: PreTrainedModel, profile: FasaProfile | None, config: FasaConfig) -> ScorerFactory:
    """TIP for every layer, its chunks on the device that holds the layer."""
    if profile is None:
        raise ValueError("enable needs a profile, got None; calibrate(model, samples) makes one.")
    tables = profile.dominant_dims(config.chunks_of(profile.layout.head_dim), config.per)
    devices = {layer: next(module.parameters()).device for layer, module in attention_modules(model).items()}
    return lambda layer: DominantChunks.from_chunks(tables[layer].to(devices[layer]))


class Fasa:
    """A model under FASA; made by `enable`.

    Attributes:
        config: the settings.
        dense_layers: the layers that stay dense, each with its reason.
        stats: what the model did since `enable` or ``stats.reset()``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FasaConfig,
        scorers: dict[int, Scorer | SequenceScorer],
        dense: dict[int, str],
    ) -> None:
        self.config = config
        self.dense_layers = dense
        self._scorers = scorers
        self._reduce: GroupReduce = "none" if config.per == "query_head" else config.group_reduce
        kv_heads = attention_shape(model)[2]
        self._budgets = spread_budget(config.budget, config.layer_budgets, sorted(scorers), kv_heads)
        self._packs = packs(model) and config.per == "kv_head"
        self._limit = maximum_positions(model)
        self._boundary: Boundary | None = None
        self._step = DecodeStep()
        self._seam = AttentionSeam(model, self._attend)
        modules = attention_modules(model)
        self.stats = FasaStats(
            [next(modules[layer].parameters()).device for layer in sorted(modules)],
            {layer: self._reads(scorer, model) for layer, scorer in scorers.items()},
        )
        self._hooks = [
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True) for module in modules.values()
        ]

    @property
    def remembers(self) -> bool:
        """Whether the method goes by earlier queries, so that a cropped or shared cache cannot be continued."""
        return any(isinstance(scorer, SequenceScorer) for scorer in self._scorers.values())

    def _reads(self, scorer: object, model: PreTrainedModel) -> ReadShare | None:
        """What a sparse query of a layer reads, where the scorer states it."""
        if not isinstance(scorer, StatesReads):
            return None
        _, query_heads, kv_heads, head_dim = attention_shape(model)
        reads = scorer.reads(head_dim, query_heads, kv_heads)
        dtype = model.dtype
        if isinstance(scorer, DominantChunks) and self._packs:
            packed = packed_bytes(scorer.dims.shape[1], self.config.packed_dtype, dtype)
            reads = replace(reads, ranking=packed / (2 * head_dim * dtype.itemsize))
        return reads.by_head(query_heads // kv_heads) if self._reduce == "none" else reads

    def disable(self) -> None:
        """Give the model its former attention back; its outputs are then bit-identical to those before `enable`."""
        self._seam.close()
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Fasa:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @contextmanager
    def sparse_from(self, start: Tensor, stop: Tensor | None = None) -> Iterator[None]:
        """Evaluate with an explicit boundary: one forward equal to token-by-token sparse decode.

        It concerns forwards of several tokens; a single token is decoded sparsely as ever. Slots count from the first
        key of the cache, padding included.

        Args:
            start: int64 [B] or [1]: queries of row b at slots >= start[b] select for themselves, earlier ones are
                dense.
            stop: int64, shaped as ``start``: queries at slots >= stop[b] are padding and are not counted.

        Raises:
            ValueError: boundaries of another shape, type or batch, or negative ones.
        """
        former, self._boundary = self._boundary, Boundary.of(start, stop)
        try:
            yield
        finally:
            self._boundary = former

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand on to the attention function what transformers keeps from it: the cache, and where the queries begin."""
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # GPT-NeoX has a name of its own for it
        layer = layer_of(module)
        if cache is not None and layer in self._scorers and self._packs:
            pack_layer(cache, layer, self._scorers[layer], self.config.packed_dtype)
            kwargs = {**kwargs, "fasa_cache": cache}
        asked = self._boundary is not None or isinstance(self._scorers.get(layer), SequenceScorer)
        if cache is not None and asked:  # a sliding cache holds fewer keys than there were slots, a static one more
            kwargs = {**kwargs, "fasa_first_slot": int(cache.get_seq_length(layer))}
        return args, kwargs

    def _attend(
        self,
        dense: DenseAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionResult:
        """The attention function: [B, Q, Hq, D] from query [B, Hq, Q, D] and the whole cache's key and value."""
        cache: Cache | None = kwargs.pop("fasa_cache", None)
        layer = layer_of(module)
        batch, _, q_len, _ = query.shape
        kv_len = key.shape[2]
        first_slot: int = kwargs.pop("fasa_first_slot", kv_len - q_len)
        softmax = self._softmax(module, query, kwargs)
        once = self._step.of(attention_mask, (batch, q_len, kv_len), query.device)
        n_valid = once("n_valid", count_valid)
        self._check(layer, key, n_valid)
        first, chosen = self._sparse_queries(layer, once, n_valid, kv_len, first_slot)
        if self.config.backend == "fastest" and not self._is_faster(layer, query, key, value):
            first, chosen = q_len, None
        self._count(layer, once, n_valid, chosen, first_slot)
        scorer = self._scorers.get(layer)
        if isinstance(scorer, SequenceScorer):
            valid = once("valid", valid_from_mask)
            sparse = torch.zeros_like(n_valid, dtype=torch.bool) if chosen is None else chosen
            forward = Forward(query, key, valid, sparse, first, first_slot, self._budgets[layer], softmax.scaling)
            scorer = Given(scorer.follow(forward))
        if chosen is None:  # keys and values of FASA-M may be the host's
            key, value = key.to(query.device), value.to(query.device)
            return dense(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError(f"{type(module).__name__} uses dropout, sparse attention does not; call model.eval().")
        assert scorer is not None
        valid = once("valid", valid_from_mask)[:, :, :, first:]
        packed = None if cache is None or q_len > 1 else packed_keys(cache, layer, scorer)
        focused = self._focused(layer, query[:, :, first:], key, value, scorer, valid, softmax, packed)
        if self._boundary is None or q_len == 1:
            return focused, None
        out, weights = dense(module, query, key, value, attention_mask, **kwargs)
        merged = torch.where(chosen[:, first:, None, None], focused, out[:, first:])
        return torch.cat([out[:, :first], merged], dim=1), weights

    def _sparse_queries(
        self, layer: int, once: Once, n_valid: Tensor, kv_len: int, first_slot: int
    ) -> tuple[int, Tensor | None]:
        """Which queries of a forward are sparse: the first row that may be (Q for none), and bool [B, Q] for all."""
        (batch, q_len), boundary = n_valid.shape, self._boundary
        if layer not in self._scorers or self._budgets[layer].covers(kv_len):
            return q_len, None
        budget = self._budgets[layer]
        over_budget = once(("over", budget), lambda *_: budget.exceeded(n_valid))
        if boundary is None or q_len == 1:
            return (0, over_budget) if q_len == 1 or self.config.prefill == "sparse" else (q_len, None)
        behind = boundary.behind(first_slot, batch, q_len, n_valid.device)
        first = max(0, boundary.lowest - first_slot)
        return (first, over_budget & behind) if first < q_len else (q_len, None)

    def _is_faster(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> bool:
        budget = self._budgets.get(layer)
        return budget is not None and sparse_is_faster(query, key, value, budget.widest(key.shape[2]))

    def _focused(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scorer: Scorer,
        valid: Tensor,
        softmax: Softmax,
        packed: PackedKeys | None,
    ) -> Tensor:
        """Sparse attention of every query, [B, Q, Hq, D], as many queries at a time as their scores fit in memory."""
        step = max(1, _SCORE_BYTES // (8 * query.shape[0] * query.shape[1] * key.shape[2]))
        parts = [
            sparse_attention(
                query[:, :, at : at + step],
                key,
                value,
                Given(scorer.scores[..., at : at + step, :]) if isinstance(scorer, Given) else scorer,
                valid[:, :, :, at : at + step],
                self._budgets[layer],
                self._reduce,
                softmax,
                self.config.backend,
                packed,
            )
            for at in range(0, query.shape[2], step)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    def _count(self, layer: int, once: Once, n_valid: Tensor, chosen: Tensor | None, first_slot: int) -> None:
        budget = self._budgets.get(layer, self.config.budget)
        counted = None
        if self._boundary is not None:
            counted = self._boundary.counted(first_slot, n_valid.shape[1], n_valid.device)
        if counted is not None:
            self.stats.add(layer, tally(n_valid * counted, chosen, budget))
        else:
            self.stats.add(layer, once((chosen is None, budget), lambda *_: tally(n_valid, chosen, budget)))

    def _softmax(self, module: nn.Module, query: Tensor, options: dict[str, Any]) -> Softmax:
        """The model's own softmax, from what it hands to its attention function."""
        softmax = Softmax(
            scaling=options.get("scaling") or query.shape[-1] ** -0.5,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        if not softmax.plain and self._seam.former == "sdpa":
            raise ValueError(
                f"{type(module).__name__} caps its logits or has learned sinks, which its implementation 'sdpa' leaves "
                "out; call model.set_attn_implementation('eager') before enable."
            )
        return softmax

    def _check(self, layer: int, key: Tensor, n_valid: Tensor) -> None:
        """Refuse what cannot end well; in decode a check would stall the device, NaN keys rank first there and show."""
        if torch.compiler.is_compiling():
            return
        if self._limit is not None and key.shape[2] > self._limit < int(n_valid.max()):
            raise ValueError(
                f"the sequence has {int(n_valid.max())} tokens and the model takes at most {self._limit}; "
                "shorten the prompt."
            )
        if n_valid.shape[1] > 1 and key.isnan().any():
            raise ValueError(
                f"the keys of layer {layer} hold NaN; check the model's weights, its dtype and its inputs."
            )
