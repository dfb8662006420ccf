"""FasaCache: packed keys are always a fresh packing of the keys, and change no result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from generation import Ids, profile_of
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.cache import PackedLayer

CONFIG = FasaConfig(n_fac=6, n_tip=3)


def packed_layers(cache: FasaCache) -> list[PackedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PackedLayer)]


def filled(model: PreTrainedModel, rows: int = 2, length: int = 20) -> FasaCache:
    cache = FasaCache(model, profile_of(model), CONFIG)
    with torch.no_grad():
        model(torch.arange(rows * length).view(rows, length) % 60 + 1, past_key_values=cache)
    return cache


def test_packs_every_sparse_layer_and_no_dense_one(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [False, True, True]
    for layer in packed_layers(cache):
        assert layer.packed is not None
        assert layer.packed.shape == (2, 2, 20, 6)
        assert layer.packed.equal(layer.scorer.pack(layer.keys))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-7),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ],
    ids=["crop", "reorder", "repeat", "select"],
)
def test_packed_keys_follow_the_cache(llama: PreTrainedModel, change: Callable[[FasaCache], None]) -> None:
    cache = filled(llama)
    before = packed_layers(cache)[0].packed
    change(cache)
    for layer in packed_layers(cache):
        assert layer.packed is not None
        assert layer.packed.equal(layer.scorer.pack(layer.keys))
    assert before is not None
    assert not torch.equal(before, packed_layers(cache)[0].packed)


def test_a_reset_cache_fills_anew(llama: PreTrainedModel, ids: Ids) -> None:
    cache = filled(llama)
    cache.reset()
    assert all(layer.packed is None for layer in packed_layers(cache))
    with torch.no_grad():
        llama(ids(9, rows=1), past_key_values=cache)
    assert all(layer.packed is not None and layer.packed.shape[2] == 9 for layer in packed_layers(cache))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_generates_what_a_plain_cache_does(llama: PreTrainedModel, ids: Ids, options: dict[str, int]) -> None:
    prompt, profile = ids(30, rows=2), profile_of(llama)
    run = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with enable(llama, profile, CONFIG) as fasa:
        plain = llama.generate(prompt, past_key_values=DynamicCache(config=llama.config), **run)
        sparse = fasa.stats.sparse_queries
        cache = FasaCache(llama, profile, CONFIG)
        assert llama.generate(prompt, past_key_values=cache, **run).equal(plain)
        assert fasa.stats.sparse_queries == 2 * sparse > 0
    assert all(layer.packed.equal(layer.scorer.pack(layer.keys)) for layer in packed_layers(cache))


def test_packed_keys_are_what_is_scored(llama: PreTrainedModel, ids: Ids) -> None:
    """Spoiling the packed keys, and nothing else, changes the result: they are really read."""
    profile = profile_of(llama)
    outputs = []
    with enable(llama, profile, CONFIG), torch.no_grad():
        for spoil in (False, True):
            cache = FasaCache(llama, profile, CONFIG)
            llama(ids(30, rows=1), past_key_values=cache)
            for layer in packed_layers(cache):
                assert layer.packed is not None
                layer.packed = -layer.packed if spoil else layer.packed
            outputs.append(llama(ids(1, rows=1), past_key_values=cache).logits)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_a_cache_of_other_chunks_is_refused(llama: PreTrainedModel, ids: Ids) -> None:
    profile = profile_of(llama)
    cache = FasaCache(llama, profile, FasaConfig(n_fac=6, n_tip=4))
    with enable(llama, profile, CONFIG), torch.no_grad():
        llama(ids(30, rows=1), past_key_values=cache)
        with pytest.raises(ValueError, match="other chunks of layer 1"):
            llama(ids(1, rows=1), past_key_values=cache)


def test_chunk_sets_per_query_head_do_not_pack(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="per='query_head'"):
        FasaCache(llama, profile_of(llama), FasaConfig(per="query_head"))


def test_disable_leaves_no_hook(llama: PreTrainedModel) -> None:
    with enable(llama, profile_of(llama), CONFIG):
        assert any(module._forward_pre_hooks for module in llama.modules())
    assert not any(module._forward_pre_hooks for module in llama.modules())
