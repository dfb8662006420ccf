"""Zero set-up: a model's dominant chunks, from the last queries of the first long prompt that it reads.

No decoding and no second forward: what `calibrate` measures of decoded queries is estimated from a few of the prompt's
own, among a sample of its keys, while the prefill runs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.calibration.from_texts import version_of
from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.calibration.provenance import Provenance, config_hash
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.config import FasaConfig
from fasa_flex.core.criteria import LogitStatistics, logit_statistics
from fasa_flex.core.packed_keys import dot_products
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.hf.masks import valid_from_mask
from fasa_flex.hf.model_structure import attention_shape, dense_layers

LEAST_KEYS = 128
"""Real keys that a row must have for its prompt to say something."""

_TOP_K = 256
"""K of contextual agreement, as in the paper; a quarter of the keys where the prompt is short."""

_TOP_SAMPLED = 32
"""Members of the top-k among the sampled keys: so every (K / 32)th key is looked at."""

_QUERIES = 4
"""The last queries of a row that are looked at: few, as it is what a prompt ends on that decoding goes on with."""

_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Sample:
    """The queries and keys of a forward that are compared.

    Attributes:
        rows: int64 [R], rows of the batch.
        queries: int64 [R, N], their queries, latest first.
        slots: int64 [R, S], their keys, spread evenly over the real ones.
        visible: bool [R, N, S], which of these keys each query may attend to.
        top_k: K among the S keys.
        length: real keys of the longest row.
    """

    rows: Tensor
    queries: Tensor
    slots: Tensor
    visible: Tensor
    top_k: int
    length: int

    @classmethod
    def of(cls, attention_mask: Tensor | None, n_valid: Tensor, sparse: Tensor | None, kv_len: int) -> Sample | None:
        """Choose; None where no row has `LEAST_KEYS`.

        A query of padding has as many valid keys as the query before it, a real one has more; so the first query of a
        forward is left out. Rows with fewer keys than are sampled are left out, too.

        Args:
            attention_mask: as transformers hands it to the attention function (`valid_from_mask`).
            n_valid: int64 [B, Q], valid keys of each query.
            sparse: bool [B or 1, Q], queries that are not to be looked at; None: none.
            kv_len: T.
        """
        batch, q_len = n_valid.shape
        usable = n_valid.diff(dim=1, prepend=n_valid[:, :1]) > 0
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
        """Mean agreement of each chunk with its head (`contextual_agreement`), estimated.

        It differs in three ways. The top K of all T keys are estimated by the top ``K * S / T`` of S of them. Equal
        scores may rank in any order, where `contextual_agreement` ranks the lower slot first. Few queries are averaged.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            layout: the chunks.

        Returns:
            float64 [Hq, D // 2].
        """
        query, key, visible = self._of(query, key)
        (n_rows, heads, n_queries, _), (kv_heads, n_keys) = query.shape, key.shape[1:3]
        unseen = ~visible[:, None, None, None]

        def top(dims: Tensor) -> Tensor:  # [R, Hkv, C, G, N, K] for the dimensions [C, P] of C scores
            queries = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)[..., dims].transpose(2, 3)
            scores = dot_products(queries, key[..., dims].transpose(2, 3))
            scores = scores.view(n_rows, kv_heads, len(dims), -1, n_queries, n_keys).masked_fill_(unseen, -torch.inf)
            return scores.topk(self.top_k, dim=-1, sorted=False).indices

        whole = top(torch.arange(query.shape[3], device=query.device)[None])
        found = torch.zeros(*whole.shape[:-1], n_keys, dtype=torch.bool, device=query.device).scatter_(-1, whole, True)
        at_once = max(1, _BYTES // (8 * found.numel()))
        parts = [top(chunks) for chunks in layout.chunks.to(query.device).split(at_once)]
        hits = [
            found.expand(-1, -1, part.shape[2], -1, -1, -1).gather(-1, part).sum((0, 4, 5)).transpose(1, 2)
            for part in parts
        ]
        counts = torch.cat(hits, dim=2).reshape(heads, -1).double()
        return counts / (n_rows * n_queries * self.top_k)

    def statistics(self, query: Tensor, key: Tensor, layout: RotaryLayout, scaling: float) -> LogitStatistics:
        """`logit_statistics` of the sample.

        Args:
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            layout: the chunks.
            scaling: of the softmax.
        """
        return logit_statistics(*self._of(query, key), layout.chunks, scaling)

    def _of(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sample of a layer's states: query [R, Hq, N, D], key [R, Hkv, S, D] and bool [R, N, S], what is seen."""
        rows, queries, slots, visible = (  # layers may be on several devices
            chosen.to(query.device) for chosen in (self.rows[:, None], self.queries, self.slots, self.visible)
        )
        return query[rows, :, queries].transpose(1, 2), key[rows, :, slots].transpose(1, 2), visible


class _Reading(threading.local):
    """What a thread has measured of the prompt that it reads."""

    def __init__(self) -> None:
        self.sample: Sample | None = None
        self.tables: dict[str, Tensor] = {}
        self.scorers: dict[int, DominantChunks] = {}


class PromptCalibration:
    """A `FasaProfile` in the making, layer by layer, while the model reads a prompt.

    Every thread measures its own prompt; the first that has measured every layer decides for all.

    Args:
        model: whose queries and keys will be measured.
        config: of `enable`.

    Attributes:
        profile: what was found, once every layer has been measured; None before.
        scorers: by layer, likewise; empty before.

    Raises:
        ValueError: a model without RoPE, or a config that does not fit it.
    """

    def __init__(self, model: PreTrainedModel, config: FasaConfig) -> None:
        self.layout = RotaryLayout.detect(model)
        self._config = config
        layers, query_heads, self._kv_heads, _ = attention_shape(model)
        bounded = dense_layers(model, (), self.layout.unrotated_layers)  # never sparse, so nothing is asked of them
        self._layers = [layer for layer in range(layers) if layer not in bounded]
        chunks, kv_heads = len(self.layout.chunks), self._kv_heads
        shapes = {
            "agreement": (query_heads, chunks),
            "variance": (query_heads, chunks),
            "covariance": (kv_heads, chunks, chunks),
            "mean_key": (kv_heads, self.layout.head_dim),
        }
        self._shapes = {name: (layers, *shape) for name, shape in shapes.items()}
        self._model = (model.config.name_or_path or type(model).__name__, model.config.get_text_config().model_type)
        self._hash = config_hash(model)
        self._versions = {name: version_of(name) for name in ("fasa_flex", "torch", "transformers")}
        self._reading, self._lock = _Reading(), threading.Lock()
        self.profile: FasaProfile | None = None
        self.scorers: dict[int, DominantChunks] = {}
        dominant_chunks(self.blank, config)  # refuses settings that do not fit

    @property
    def blank(self) -> FasaProfile:
        """A profile of the right shape that says nothing."""
        return self._profile(self._empty(), "nothing", 1, 1)

    def _empty(self) -> dict[str, Tensor]:
        """Tables of every layer, before anything is measured."""
        return {name: torch.zeros(shape) for name, shape in self._shapes.items()}

    def _profile(self, tables: dict[str, Tensor], source: str, queries: int, top_k: int) -> FasaProfile:
        provenance = Provenance(
            model_id=self._model[0],
            model_type=self._model[1],
            config_hash=self._hash,
            kv_heads=self._kv_heads,
            top_k=top_k,
            max_new_tokens=0,
            queries=queries,
            sample_hashes=(source,),
            versions=self._versions,
        )
        return FasaProfile(layout=self.layout, provenance=provenance, **tables)

    def scorer(self, layer: int) -> DominantChunks | None:
        """The scorer of a layer: what was found, or what this thread has measured so far."""
        found = self.scorers  # read once: another thread may forget it
        return (found if self.profile is not None else self._reading.scorers).get(layer)

    def begin(self) -> None:
        """Forget what this thread has of a prompt that was broken off."""
        self._reading.sample, self._reading.tables, self._reading.scorers = None, {}, {}

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
        """Find the chunks of a layer, from a forward of several tokens; False where the prompt is too short to tell.

        Args:
            layer: layers come in their order; the first of a forward decides what is sampled in all of them.
            query: float [B, Hq, Q, D], post-RoPE.
            key: float [B, Hkv, T, D], post-RoPE.
            attention_mask: as for `Sample.of`.
            n_valid: as for `Sample.of`.
            sparse: as for `Sample.of`.
            scaling: of the softmax.

        Raises:
            ValueError: it is asked for in a compiled graph, which cannot keep what it finds.
        """
        if layer not in self._layers or n_valid.shape[1] == 1 or key.shape[2] < LEAST_KEYS:
            return False
        if torch.compiler.is_compiling():
            raise ValueError("a compiled model cannot calibrate itself on its prompt; run the prefill uncompiled once.")
        reading = self._reading
        if layer == self._layers[0]:
            reading.sample, reading.tables = Sample.of(attention_mask, n_valid, sparse, key.shape[2]), self._empty()
        sample, tables = reading.sample, reading.tables
        if sample is None:
            return False
        parts = sample.statistics(query, key, self.layout, scaling)
        found = {"agreement": sample.agreement(query, key, self.layout), **vars(parts)}
        for name, table in tables.items():
            table[layer] = found[name].cpu()
        source = (f"the last queries of a prompt of {sample.length} tokens", sample.queries.numel(), sample.top_k)
        own = self._profile({name: table[layer, None] for name, table in tables.items()}, *source)
        with torch.inference_mode(False):  # a forward with gradients may follow
            reading.scorers[layer] = dominant_chunks(own, self._config)(0).to(query.device)
        if layer == self._layers[-1]:
            with self._lock:
                if self.profile is None:
                    self.scorers, self.profile = reading.scorers, self._profile(tables, *source)
            self.begin()
        return True

    def forget(self) -> None:
        """Measure the next long prompt anew."""
        with self._lock:
            self.profile, self.scorers = None, {}
