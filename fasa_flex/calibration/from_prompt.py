"""Calibration without set-up: dominant chunks from the last queries of the first long prompt.

`calibrate` measures decoded queries; here a few of the prompt's last queries and a sample of its keys estimate the same
tables during the prefill, without decoding and without a second forward.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.calibration.provenance import Provenance
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.criteria import LogitStatistics, logit_statistics
from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.pieces import rows_that_fit
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.masks import valid_from_mask
from fasa_flex.hf.model_structure import attention_shape, dense_layers

LEAST_KEYS = 128
"""Fewest valid keys of a prompt that is measured."""

_TOP_K = 256
"""K of contextual agreement, as in the paper; a quarter of the keys if the prompt is short."""

_TOP_SAMPLED = 32
"""K among the sampled keys, of which there is one in K / 32."""

_QUERIES = 4
"""Last queries of a row that are measured: few, since decoding continues the end of the prompt."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The queries and keys of one forward that are measured.

    Attributes:
        rows: int64 [R], rows of the batch.
        queries: int64 [R, N], positions of the sampled queries, latest first.
        slots: int64 [R, S], slots of the sampled keys, spread evenly over the valid ones.
        visible: bool [R, N, S], the sampled keys that each query may attend to.
        top_k: K among the S keys.
        length: valid keys of the longest row.
    """

    rows: Tensor
    queries: Tensor
    slots: Tensor
    visible: Tensor
    top_k: int
    length: int

    @classmethod
    def of(cls, attention_mask: Tensor | None, n_valid: Tensor, sparse: Tensor | None, kv_len: int) -> Sample | None:
        """Choose the sample; None if no row has `LEAST_KEYS` valid keys.

        A real query has more valid keys than the query before it, a query of padding as many. So the first query of a
        forward is never sampled, unless the prompt attends in both directions. Rows with fewer valid keys than the
        sample are left out.

        Args:
            attention_mask: the mask that transformers passes to the attention function (`valid_from_mask`).
            n_valid: int64 [B, Q], number of valid keys of each query.
            sparse: bool [B or 1, Q], sparse queries, which are not measured; None: all are dense.
            kv_len: T.
        """
        batch, q_len = n_valid.shape
        usable = n_valid.diff(dim=1, prepend=n_valid[:, :1]) > 0
        both_ways = ~usable.any(1, keepdim=True)  # every query sees the whole prompt, as in PaliGemma
        if both_ways.any() and attention_mask is not None:
            own = valid_from_mask(attention_mask, (batch, q_len, kv_len), n_valid.device)[:, 0, 0, :, kv_len - q_len :]
            usable = usable | (both_ways & own.diagonal(dim1=1, dim2=2))
        usable = usable if sparse is None else usable & ~sparse
        keys = (n_valid * usable).amax(1)
        length = int(keys.max())
        if length < LEAST_KEYS:
            return None
        top_k = min(_TOP_K, length // 4)
        stride = top_k // _TOP_SAMPLED
        n_keys = length // stride
        rows = (keys >= n_keys).nonzero().flatten()
        usable, keys = usable[rows], keys[rows]
        back = torch.arange(min(_QUERIES, int(usable.sum(1).min())), device=n_valid.device)
        queries = torch.searchsorted(usable.cumsum(1), usable.sum(1, keepdim=True) - back)
        if attention_mask is None:
            visible = torch.arange(kv_len, device=n_valid.device) < n_valid[rows[:, None], queries, None]
        else:
            valid = valid_from_mask(attention_mask, (batch, q_len, kv_len), n_valid.device)[:, 0, 0]
            visible = valid.expand(batch, -1, -1)[rows[:, None], queries]
        nth = torch.arange(n_keys, device=n_valid.device) * keys[:, None] // n_keys + 1
        slots = torch.searchsorted(visible[:, 0].long().cumsum(-1), nth)
        visible = visible.gather(-1, slots[:, None].expand(-1, len(back), -1))
        return cls(rows, queries, slots, visible, top_k // stride, length)

    @torch.no_grad()
    def agreement(self, query: Tensor, key: Tensor, layout: RotaryLayout) -> Tensor:
        """An estimate of `contextual_agreement`, averaged over the sampled queries.

        The top K of T keys are estimated by the top ``K * S / T`` of S sampled keys. Equal scores may rank in any
        order; `contextual_agreement` ranks the lower slot first.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            layout: the chunks.

        Returns:
            float64 [Hq, D // 2].
        """
        query, key, visible = self._take(query, key)
        (n_rows, heads, n_queries, _), (kv_heads, n_keys) = query.shape, key.shape[1:3]
        unseen = ~visible[:, None, None, None]

        def top(dims: Tensor) -> Tensor:  # [R, Hkv, C, G, N, K] for the dimensions [C, P] of C scores
            queries = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)[..., dims].transpose(2, 3)
            scores = dot_products(queries, key[..., dims].transpose(2, 3))
            scores = scores.view(n_rows, kv_heads, len(dims), -1, n_queries, n_keys).masked_fill_(unseen, -torch.inf)
            return scores.topk(self.top_k, dim=-1, sorted=False).indices

        whole = top(torch.arange(query.shape[3], device=query.device)[None])
        found = torch.zeros(*whole.shape[:-1], n_keys, dtype=torch.bool, device=query.device).scatter_(-1, whole, True)
        parts = [top(chunks) for chunks in layout.chunks.to(query.device).split(rows_that_fit(8 * found.numel()))]
        hits = [
            found.expand(-1, -1, part.shape[2], -1, -1, -1).gather(-1, part).sum((0, 4, 5)).transpose(1, 2)
            for part in parts
        ]
        counts = torch.cat(hits, dim=2).reshape(heads, -1).double()
        return counts / (n_rows * n_queries * self.top_k)

    def statistics(self, query: Tensor, key: Tensor, layout: RotaryLayout, scaling: float) -> LogitStatistics:
        """`logit_statistics` of the sampled queries and keys.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            layout: the chunks.
            scaling: factor of the logits in the softmax.
        """
        return logit_statistics(*self._take(query, key), layout.chunks, scaling)

    def _take(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sampled query [R, Hq, N, D], key [R, Hkv, S, D] and ``visible`` bool [R, N, S] of a layer."""
        rows, queries, slots, visible = (  # layers may be on several devices
            chosen.to(query.device) for chosen in (self.rows[:, None], self.queries, self.slots, self.visible)
        )
        return query[rows, :, queries].transpose(1, 2), key[rows, :, slots].transpose(1, 2), visible


class _Prompt(threading.local):
    """One thread's measurements of the prompt that it is prefilling."""

    def __init__(self) -> None:
        self.sample: Sample | None = None
        self.tables: dict[str, Tensor] = {}
        self.scorers: dict[int, DominantChunks] = {}


class PromptCalibration:
    """Measures a `FasaProfile` layer by layer while the model prefills a prompt.

    Every thread measures its own prompt. The first thread that has measured every layer sets the profile for all.

    Args:
        model: the model whose queries and keys will be measured.
        config: the config given to `enable`.

    Attributes:
        profile: the profile; None until every layer has been measured.
        scorers: the scorers by layer; empty until then.

    Raises:
        ValueError: a model without frequency chunks (`RotaryLayout.detect`), or a config that does not fit it.
    """

    def __init__(self, model: PreTrainedModel, config: FasaConfig) -> None:
        self.layout = RotaryLayout.detect(model)
        self._config, self._shard = config, HeadShard.of(model)
        layers, query_heads, kv_heads, _ = attention_shape(model)
        never_sparse = dense_layers(model, (), self.layout.unserved_layers)
        self._layers = [layer for layer in range(layers) if layer not in never_sparse]
        chunks = len(self.layout.chunks)
        shapes = {
            "agreement": (query_heads, chunks),
            "variance": (query_heads, chunks),
            "covariance": (kv_heads, chunks, chunks),
            "mean_key": (kv_heads, self.layout.head_dim),
        }
        self._shapes = {name: (layers, *shape) for name, shape in shapes.items()}
        self._provenance = Provenance.of(model, top_k=1, max_new_tokens=0, queries=1)
        self._prompt, self._lock = _Prompt(), threading.Lock()
        self.profile: FasaProfile | None = None
        self.scorers: dict[int, DominantChunks] = {}
        dominant_chunks(self.blank, config)  # refuses settings that do not fit

    @property
    def blank(self) -> FasaProfile:
        """A profile of the model's shape, with tables of zeros."""
        return self._profile(self._zeros(), "nothing", 1, 1)

    def _zeros(self) -> dict[str, Tensor]:
        """Tables of every layer, before anything is measured."""
        return {name: torch.zeros(shape) for name, shape in self._shapes.items()}

    def _profile(self, tables: dict[str, Tensor], source: str, queries: int, top_k: int) -> FasaProfile:
        provenance = replace(self._provenance, top_k=top_k, queries=queries, sample_hashes=(source,))
        return FasaProfile(layout=self.layout, provenance=provenance, **tables)

    def scorer(self, layer: int) -> DominantChunks | None:
        """The scorer of a layer, of the profile or of this thread's unfinished prompt; None if not measured yet."""
        found = self.scorers  # read once: another thread may call `forget`
        return (found if self.profile is not None else self._prompt.scorers).get(layer)

    def measures(self, layer: int) -> bool:
        """Whether a layer is measured; layers that can never be sparse are not."""
        return layer in self._layers

    def begin(self) -> None:
        """Drop this thread's measurements of an unfinished prompt."""
        self._prompt.sample, self._prompt.tables, self._prompt.scorers = None, {}, {}

    def measure(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        n_valid: Tensor,
        sparse: Tensor | None,
        scaling: float,
    ) -> bool:
        """Measure the chunks of one layer in a forward of several tokens.

        Args:
            layer: number of the layer; layers come in order, and the first one's sample serves all of a forward.
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            attention_mask: as for `Sample.of`.
            n_valid: as for `Sample.of`.
            sparse: as for `Sample.of`.
            scaling: factor of the logits in the softmax.

        Returns:
            whether the layer was measured; False if the prompt is too short.

        Raises:
            ValueError: called in a compiled graph, which cannot store the result.
        """
        if layer not in self._layers or n_valid.shape[1] == 1 or key.shape[2] < LEAST_KEYS:
            return False
        if torch.compiler.is_compiling():
            raise ValueError("a compiled model cannot calibrate itself on its prompt; run the prefill uncompiled once.")
        prompt = self._prompt
        if layer == self._layers[0]:
            prompt.sample, prompt.tables = Sample.of(attention_mask, n_valid, sparse, key.shape[2]), self._zeros()
        sample, tables = prompt.sample, prompt.tables
        if sample is None:
            return False
        parts = sample.statistics(query, key, self.layout, scaling)
        found = {"agreement": sample.agreement(query, key, self.layout), **vars(parts)}
        for name, table in tables.items():
            table[layer] = self._shard.whole(found[name]).cpu()
        source = (f"the last queries of a prompt of {sample.length} tokens", sample.queries.numel(), sample.top_k)
        own = self._profile({name: table[layer, None] for name, table in tables.items()}, *source)
        with torch.inference_mode(False):  # a forward with gradients may follow
            prompt.scorers[layer] = self._shard.scorer(dominant_chunks(own, self._config)(0)).to(query.device)
        if layer == self._layers[-1]:
            with self._lock:
                if self.profile is None:
                    self.scorers, self.profile = prompt.scorers, self._profile(tables, *source)
            self.begin()
        return True

    def forget(self) -> None:
        """Drop the profile; the next long prompt is measured."""
        with self._lock:
            self.profile, self.scorers = None, {}
