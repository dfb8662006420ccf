"""Caches with packed keys: always a fresh packing of the keys, made by `enable` itself, and no result changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import Ids, generate, profile_of
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.host_layers import HostLayer, StaticHostLayer
from fasa_flex.packed_layers import PackedLayer, StaticPackedLayer

CONFIG = FasaConfig(n_fac=6, n_tip=3)


def packed_layers(cache: Cache) -> list[PackedLayer | StaticPackedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PackedLayer | StaticPackedLayer)]


def filled(model: PreTrainedModel, rows: int = 2, length: int = 20, **options: Any) -> FasaCache:
    cache = FasaCache(model, profile_of(model), CONFIG, **options)
    with torch.no_grad():
        model(torch.arange(rows * length).view(rows, length) % 60 + 1, past_key_values=cache)
    return cache


def assert_packed(cache: Cache) -> None:
    """Every packed layer holds what packing its keys anew gives."""
    assert packed_layers(cache)
    for layer in packed_layers(cache):
        assert layer.packed is not None
        length = int(layer.get_seq_length())
        assert layer.packed.rows(length).equal(layer.scorer.pack(layer.keys)[:, :, :length])


@pytest.mark.parametrize("static", [False, True])
def test_packs_every_sparse_layer_and_no_dense_one(llama: PreTrainedModel, static: bool) -> None:
    cache = filled(llama, max_cache_len=50 if static else None)
    kind = StaticPackedLayer if static else PackedLayer
    assert [isinstance(layer, kind) for layer in cache.layers] == [False, True, True]
    assert_packed(cache)
    assert packed_layers(cache)[0].packed.rows(20).shape == (2, 2, 20, 6)


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
def test_packed_keys_follow_the_cache(llama: PreTrainedModel, ids: Ids, change: Callable[[FasaCache], None]) -> None:
    cache, plain = filled(llama), DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(torch.arange(40).view(2, 20) % 60 + 1, past_key_values=plain)
        for held in (cache, plain):
            change(held)
        assert_packed(cache)
        for seed in range(3):
            rows = ids(2, seed=seed, rows=cache.layers[0].keys.shape[0])
            assert llama(rows, past_key_values=cache).logits.equal(llama(rows, past_key_values=plain).logits)
            assert_packed(cache)


def test_a_cache_grows_in_place_and_past_its_room(llama: PreTrainedModel, ids: Ids) -> None:
    """No copy for a token, a few for hundreds; a deep copy goes its own way."""
    cache = filled(llama)
    layer = packed_layers(cache)[0]
    starts = set()
    with torch.no_grad():
        fork = copy.deepcopy(cache)
        for _ in range(200):
            llama(ids(2, rows=2), past_key_values=cache)
            starts.add(layer.keys.data_ptr())
    assert layer.keys.shape[2] == 420
    assert 2 <= len(starts) <= 5
    assert_packed(cache)
    assert_packed(fork)
    assert fork.get_seq_length() == 20


def test_a_cache_filled_in_inference_mode_grows_outside_of_it(llama: PreTrainedModel, ids: Ids) -> None:
    with torch.inference_mode():
        cache = filled(llama)
    with torch.no_grad():
        llama(ids(2, rows=2), past_key_values=cache)
    assert_packed(cache)


def test_a_cache_can_be_trained_through(llama: PreTrainedModel, ids: Ids) -> None:
    """With gradients it grows as a plain one does, by copies that autograd knows."""
    grads = []
    for cache in (FasaCache(llama, profile_of(llama), CONFIG), DynamicCache(config=llama.config)):
        llama.zero_grad()
        llama(ids(9, rows=1), past_key_values=cache)
        llama(ids(3, rows=1), past_key_values=cache).logits.sum().backward()
        grads.append(llama.get_parameter("model.layers.1.self_attn.k_proj.weight").grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("static", [False, True])
def test_a_reset_cache_fills_anew(llama: PreTrainedModel, ids: Ids, static: bool) -> None:
    cache = filled(llama, max_cache_len=50 if static else None)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        llama(ids(9, rows=2), past_key_values=cache)
    assert cache.get_seq_length() == 9
    assert_packed(cache)


# Made by `enable` itself.


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_enable_packs_a_plain_cache(llama: PreTrainedModel, ids: Ids, make: Callable[..., Cache]) -> None:
    cache = make(config=llama.config)
    with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
        llama(ids(20, rows=2), past_key_values=cache)
        assert len(packed_layers(cache)) == 2
        for seed in range(3):
            llama(ids(1, seed=seed, rows=2), past_key_values=cache)
            assert_packed(cache)


@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: StaticCache(config, 64)])
def test_a_cache_filled_before_enable_is_packed_as_it_stands(
    llama: PreTrainedModel, ids: Ids, make: Callable[..., Cache]
) -> None:
    """Even one that makes its layers only when they are filled."""
    profile, logits = profile_of(llama), []
    with torch.no_grad():
        for early in (True, False):
            cache = make(llama.config)
            if early:
                with enable(llama, profile, CONFIG):
                    llama(ids(20, rows=2), past_key_values=cache)
            else:
                llama(ids(20, rows=2), past_key_values=cache)
                assert not packed_layers(cache)
            with enable(llama, profile, CONFIG):
                logits.append(llama(ids(1, rows=2), past_key_values=cache).logits)
                assert_packed(cache)
    assert torch.equal(*logits)


def test_a_cache_of_other_chunks_is_packed_anew(llama: PreTrainedModel, ids: Ids) -> None:
    profile, logits = profile_of(llama), []
    with torch.no_grad():
        for n_tip in (4, 3):
            cache = FasaCache(llama, profile, FasaConfig(n_fac=6, n_tip=n_tip))
            with enable(llama, profile, CONFIG):
                llama(ids(30, rows=1), past_key_values=cache)
                logits.append(llama(ids(1, rows=1), past_key_values=cache).logits)
                assert packed_layers(cache)[0].packed.rows(31).shape[-1] == 6
                assert_packed(cache)
    assert torch.equal(*logits)


def test_a_full_static_cache_is_a_clear_error_before_anything_is_lost(llama: PreTrainedModel, ids: Ids) -> None:
    cache = filled(llama, max_cache_len=24)
    before = [layer.keys.clone() for layer in packed_layers(cache)]
    with torch.no_grad(), pytest.raises(ValueError, match=r"20 of at most 24 .* 5 more") as error:
        llama.model.layers[1].self_attn(
            torch.randn(2, 5, 64), llama.model.rotary_emb(torch.randn(1), torch.arange(5)[None]), None, cache
        )
    assert "\n" not in str(error.value)
    assert all(layer.keys.equal(keys) for layer, keys in zip(packed_layers(cache), before, strict=True))


# FASA-M.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (HostLayer, {}),
        (HostLayer, {"num_beams": 3}),
        (HostLayer, {"prompt_lookup_num_tokens": 3}),
        (StaticHostLayer, {}),
        (StaticHostLayer, {"num_beams": 3}),
    ],
    ids=str,
)
def test_keys_in_host_memory_change_no_result(
    llama: PreTrainedModel, ids: Ids, kind: type, options: dict[str, int]
) -> None:
    prompt, profile, length = ids(30, rows=1), profile_of(llama), None if kind is HostLayer else 48
    run = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with enable(llama, profile, CONFIG):
        expected = llama.generate(prompt, **run)
        cache = FasaCache(llama, profile, CONFIG, placement="host", max_cache_len=length)
        assert llama.generate(prompt, past_key_values=cache, **run).equal(expected)
    assert [type(layer) is kind for layer in cache.layers] == [False, True, True]
    assert_packed(cache)


@pytest.mark.parametrize("length", [None, 64])
def test_rows_held_of_the_host_follow_what_happens_to_the_cache(llama: PreTrainedModel, length: int | None) -> None:
    """What the device holds must never be a row of another token, or of another row of the batch."""
    cache = filled(llama, placement="host", max_cache_len=length)
    for layer in packed_layers(cache):
        held = layer.held
        assert (tuple(held.slots.shape), tuple(held.keys.shape)) == ((2, 2, 6), (2, 2, 6, 16))
        held.slots.copy_(torch.arange(24).view(2, 2, 6))
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer in packed_layers(cache):
        assert layer.held.slots[0].equal(layer.held.slots[1])
        assert layer.held.slots[0, 0, 0] == 12
    if length is None:
        cache.crop(-4)
    else:
        cache.reset()
    assert all((layer.held.slots == -1).all() for layer in packed_layers(cache))


def test_a_static_cache_that_cannot_be_pinned_is_a_clear_error_and_can_be_tried_again(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FasaCache(llama, profile_of(llama), CONFIG, placement="host", max_cache_len=24)
    real, prompt = torch.zeros, ids(20, rows=2)

    def fail(*args: Any, **options: Any) -> Tensor:
        if "pin_memory" in options:
            raise RuntimeError("out of memory")
        return real(*args, **options)

    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(torch, "zeros", fail)
            with pytest.raises(ValueError, match=r"the host has no .* placement='device'") as error:
                packed_layers(cache)[0].update(*torch.randn(2, 2, 2, 20, 16).unbind())
        assert "\n" not in str(error.value)
        llama(prompt, past_key_values=cache)
    assert cache.get_seq_length() == 20
    assert_packed(cache)


def test_a_static_cache_in_host_memory_forgets_rows_that_a_longer_forward_may_overwrite(
    llama: PreTrainedModel, ids: Ids
) -> None:
    cache = filled(llama, placement="host", max_cache_len=64)
    layer = packed_layers(cache)[0]
    layer.held.slots.fill_(3)
    with torch.no_grad():
        llama(ids(2, rows=2), past_key_values=cache)
    assert (layer.held.slots == -1).all()
    assert layer.held.length is layer.cumulative_length


def test_sizes_are_those_of_the_paper(llama: PreTrainedModel) -> None:
    """2 n_tip numbers a key beside 2 d: here 6 beside 32, two heads of four bytes; layer 0 is dense."""
    held = 2 * 6 * (2 * 16 + 2) * 4 / 20  # n_fac rows of two heads, their slots and places, over 20 tokens
    for placement, device, host in (("device", (256 + 2 * 304) / 3, 0.0), ("host", (256 + 96 + 2 * held) / 3, 512 / 3)):
        cache = filled(llama, placement=placement)
        assert (cache.size.device, cache.size.host, cache.size.dense) == pytest.approx((device, host, 256.0))
    with pytest.raises(ValueError, match="empty"):
        _ = FasaCache(llama, profile_of(llama), CONFIG).size


def test_memory_that_cannot_be_pinned_is_a_clear_error_before_anything_is_lost(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(llama, placement="host")
    layer = packed_layers(cache)[0]
    before, room = layer.keys.clone(), layer._buffers["keys"].shape[2]

    def fail(*args: object, **options: object) -> Tensor:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        monkeypatch.setattr(torch, "zeros", fail)
        with pytest.raises(ValueError, match=r"the host has no .* placement='device'"):
            layer.update(*torch.randn(2, 2, 2, room, 16).unbind())
    assert layer.keys.equal(before)
    assert layer.get_seq_length() == 20
    assert layer.packed.rows(20).equal(layer.scorer.pack(before))


def test_impossible_placements_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="disk"):
        FasaCache(llama, profile_of(llama), CONFIG, placement="disk")


# Lower precision.


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 1 / 120)])
def test_a_lower_precision_holds_the_keys_nearly(llama: PreTrainedModel, ids: Ids, dtype: str, error: float) -> None:
    config = FasaConfig(n_fac=6, n_tip=3, packed_dtype=dtype)
    cache = FasaCache(llama, profile_of(llama), config)
    with enable(llama, profile_of(llama), config), torch.no_grad():
        for seed in range(3):
            llama(ids(20, seed=seed, rows=2), past_key_values=cache)
        for layer in packed_layers(cache):
            exact = layer.scorer.pack(layer.keys)
            assert layer.packed.tiles.dtype == getattr(torch, dtype)
            allowed = error * exact.abs().amax(-1, keepdim=True) + 1e-7
            assert ((layer.packed.rows(60).float() - exact).abs() <= allowed).all()


def test_int8_keys_cost_a_byte_a_dimension_and_a_scale(llama: PreTrainedModel) -> None:
    sizes = {}
    for dtype in (None, "bfloat16", "int8"):
        cache = FasaCache(llama, profile_of(llama), FasaConfig(n_tip=3, packed_dtype=dtype), max_cache_len=64)
        with torch.no_grad():
            llama(torch.arange(20)[None], past_key_values=cache)
        sizes[dtype] = packed_layers(cache)[0].packed.n_bytes
    slots = 2 * 64  # heads, slots
    assert sizes == {None: slots * 6 * 4, "bfloat16": slots * 6 * 2, "int8": slots * (6 + 2)}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lower_precision_decodes_nearly_the_same(llama: PreTrainedModel, ids: Ids, dtype: str) -> None:
    """Other keys near the budget's edge, the same attention: logits differ, but far less than from dense."""
    profile, prompt = profile_of(llama), ids(40, rows=2)
    dense = generate(llama, prompt, max_new_tokens=2)[1]
    results = []
    for packed_dtype in (None, dtype):
        with enable(llama, profile, FasaConfig(n_fac=12, n_tip=6, packed_dtype=packed_dtype)):
            results.append(generate(llama, prompt, max_new_tokens=2)[1])
    assert (results[0] - results[1]).norm() < 0.3 * (results[0] - dense).norm()


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
    assert_packed(cache)


@pytest.mark.parametrize("static", [False, True])
def test_packed_keys_are_what_is_scored(llama: PreTrainedModel, ids: Ids, static: bool) -> None:
    """Spoiling the packed keys, and nothing else, changes the result: they are really read."""
    profile = profile_of(llama)
    outputs = []
    with enable(llama, profile, CONFIG), torch.no_grad():
        for spoil in (False, True):
            cache = FasaCache(llama, profile, CONFIG, max_cache_len=40 if static else None)
            llama(ids(30, rows=1), past_key_values=cache)
            for layer in packed_layers(cache):
                assert layer.packed is not None
                if spoil:
                    layer.packed = layer.packed.change(Tensor.neg)
            outputs.append(llama(ids(1, rows=1), past_key_values=cache).logits)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_chunk_sets_per_query_head_do_not_pack(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="per='query_head'"):
        FasaCache(llama, profile_of(llama), FasaConfig(per="query_head"))


def test_disable_leaves_no_hook(llama: PreTrainedModel) -> None:
    with enable(llama, profile_of(llama), CONFIG):
        assert any(module._forward_pre_hooks for module in llama.modules())
    assert not any(module._forward_pre_hooks for module in llama.modules())
