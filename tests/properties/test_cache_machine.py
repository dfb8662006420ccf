"""FasaCache through any sequence of changes equals one that was filled anew with what should be in it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import KV_HEADS, LAYERS, tiny
from generation import profile_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from properties.calls import cases, whole
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, FasaProfile, fasa_attention

DIM, DENSE = 16, (0,)
MOST = 40  # rows or tokens


@functools.cache
def model_and_profile() -> tuple[PreTrainedModel, FasaProfile]:
    model = tiny("Llama")
    return model, profile_of(model)


class CacheMachine(RuleBasedStateMachine):
    """Beside the cache, plain tensors: what keys and values of each layer should be, [B, Hkv, T, D]."""

    @initialize(
        n_tip=st.integers(1, 8),
        rows=st.integers(1, 3),
        packed_dtype=st.sampled_from([None, "bfloat16", "float16", "int8", "int4"]),
        placement=st.sampled_from(["device", "host"]),
    )
    def make(self, n_tip: int, rows: int, packed_dtype: Any, placement: Any) -> None:
        model, profile = model_and_profile()
        config = FasaConfig(n_tip=n_tip, dense_layers=DENSE, packed_dtype=packed_dtype)
        self.exact = packed_dtype not in ("int8", "int4")  # numbers up to 3 are exact in the others
        self.chunks = profile.dominant_dims(n_tip)
        self.new = lambda: FasaCache(model, profile, config, placement=placement)
        self.cache, self.seed = self.new(), 0
        self.empty(rows)

    def empty(self, rows: int) -> None:
        self.rows = rows
        self.keys = [torch.zeros(rows, KV_HEADS, 0, DIM) for _ in range(LAYERS)]
        self.values = [torch.zeros(rows, KV_HEADS, 0, DIM) for _ in range(LAYERS)]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def change(self, function: object) -> None:
        self.keys, self.values = [function(x) for x in self.keys], [function(x) for x in self.values]

    def random(self, *shape: int) -> Tensor:
        self.seed += 1
        return whole(torch.Generator().manual_seed(self.seed), 3, *shape).float()

    @rule(tokens=st.integers(1, 9))
    def append(self, tokens: int) -> None:
        if self.length + tokens > MOST:
            return
        for layer in range(LAYERS):
            k, v = (self.random(self.rows, KV_HEADS, tokens, DIM) for _ in range(2))
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
            keys, values = self.cache.update(k, v, layer)
            assert keys.equal(self.keys[layer])
            assert values.equal(self.values[layer])

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, self.length))
        self.cache.crop(-tokens)
        self.change(lambda x: x[:, :, : x.shape[2] - tokens])

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        order = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=self.rows, max_size=self.rows))
        self.cache.reorder_cache(torch.tensor(order))
        self.change(lambda x: x[order])

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        kept = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=4))
        self.cache.batch_select_indices(torch.tensor(kept))
        self.change(lambda x: x[kept])
        self.rows = len(kept)

    @precondition(lambda self: self.length > 0)
    @rule(times=st.integers(1, 3))
    def repeat(self, times: int) -> None:
        if self.rows * times > MOST:
            return
        self.cache.batch_repeat_interleave(times)
        rows = [row for row in range(self.rows) for _ in range(times)]
        self.change(lambda x: x[rows])
        self.rows = len(rows)

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        self.cache.reset()
        self.empty(rows)

    @precondition(lambda self: self.length > 0)
    @rule(layer=st.integers(0, LAYERS - 1))
    def offload_and_prefetch(self, layer: int) -> None:
        self.cache.layers[layer].offload()
        self.cache.layers[layer].prefetch()

    @precondition(lambda self: self.length > 0 and self.exact)
    @rule(n_fac=st.integers(1, 12))
    def attend(self, n_fac: int) -> None:
        """A decode step that scores with the packed keys is one that scores with the keys."""
        q = self.random(self.rows, 2 * KV_HEADS, 1, DIM)
        for layer in set(range(LAYERS)) - set(DENSE):
            chunks, packed = self.chunks[layer], self.cache.layers[layer].packed
            tensors = (q, self.keys[layer], self.values[layer], chunks)
            plain = fasa_attention(*tensors, n_fac=n_fac, backend="gather")
            assert fasa_attention(*tensors, n_fac=n_fac, packed_keys=packed, backend="gather").equal(plain)

    @invariant()
    def is_as_filled_anew(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.get_seq_length() == self.length
        fresh = self.new()
        for layer in range(LAYERS):
            packed, fresh_layer = getattr(self.cache.layers[layer], "packed", None), fresh.layers[layer]
            if self.length == 0:
                assert packed is None or packed.rows(0).numel() == 0
                continue
            fresh.update(self.keys[layer], self.values[layer], layer)
            assert self.cache.layers[layer].keys.equal(self.keys[layer])
            assert self.cache.layers[layer].values.equal(self.values[layer])
            if layer in DENSE:
                assert packed is None
                continue
            by_hand = [self.keys[layer][:, n][..., pairs.flatten()] for n, pairs in enumerate(self.chunks[layer])]
            if self.exact:
                assert packed.rows(self.length).equal(torch.stack(by_hand, 1))
            assert packed.rows(self.length).equal(fresh_layer.packed.rows(self.length))


TestCache = CacheMachine.TestCase
TestCache.settings = settings(cases(0.5), stateful_step_count=25)
