"""Caches with packed keys: always a fresh packing of the keys, made by `enable` itself, and no result changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from filled import CONFIG, assert_packed, filled, packed_layers
from generation import Ids, generate, profile_of
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer


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
    assert_follows(llama, ids, filled(llama), DynamicCache(config=llama.config), change)


def assert_follows(llama: PreTrainedModel, ids: Ids, cache: Cache, plain: Cache, change: Callable[..., object]) -> None:
    """A `filled` cache and an empty plain one, filled alike and changed alike, decode alike."""
    with torch.no_grad():
        llama(torch.arange(40).view(2, 20) % 60 + 1, past_key_values=plain)
        for held in (cache, plain):
            change(held)
        assert_packed(cache)
        for seed in range(3):
            rows = ids(2, seed=seed, rows=cache.layers[0].keys.shape[0])
            assert llama(rows, past_key_values=cache).logits.equal(llama(rows, past_key_values=plain).logits)
            assert_packed(cache)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: [layer.offload() for layer in cache.layers],
        lambda cache: [change() for layer in cache.layers for change in (layer.offload, layer.prefetch)],
        lambda cache: cache.reset(),
    ],
    ids=["reorder", "offload", "offload and prefetch", "reset"],
)
def test_packed_keys_follow_a_static_cache(
    llama: PreTrainedModel, ids: Ids, change: Callable[[Cache], object], placement: str
) -> None:
    cache = filled(llama, placement=placement, max_cache_len=40)
    assert_follows(llama, ids, cache, StaticCache(llama.config, max_cache_len=40), change)


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


# Sizes.


def test_sizes_are_those_of_the_paper(llama: PreTrainedModel) -> None:
    """2 n_tip numbers a key beside 2 d: here 6 beside 32, two heads of four bytes; layer 0 is dense."""
    rows = 2 * 6 * 2 * 16 * 4 / 40  # n_fac rows of two heads, over 40 tokens in two rows of the batch
    for placement, formula in (("device", (256 + 2 * 304) / 3), ("host", (256 + 2 * (48 + 2 * rows)) / 3)):
        size = filled(llama, placement=placement).size
        assert (size.dense, size.formula) == pytest.approx((256.0, formula))
        assert (size.host > 0) == (placement == "host")
        assert size.ratio == size.device / size.formula > 1
        static = filled(llama, placement=placement, max_cache_len=20).size
        assert static.host == (512 / 3 if placement == "host" else 0)
        slots = 2 * 2 * 6 * 2 * 4 / 40 * (placement == "host")  # which rows are held, and where
        assert static.device == pytest.approx(static.formula + 2 * (48 * 12 / 20 + slots) / 3)  # two tiles of 16 keys
    with pytest.raises(ValueError, match="empty"):
        _ = FasaCache(llama, profile_of(llama), CONFIG).size


def test_room_to_grow_counts(llama: PreTrainedModel) -> None:
    for placement in ("device", "host"):
        cache = filled(llama, placement=placement)
        layers = packed_layers(cache)
        room = sum(buffer.nbytes for layer in layers for buffer in layer._buffers)
        packed = sum(layer.packed.n_bytes for layer in layers)
        held = sum(layer.resident.n_bytes for layer in layers) if placement == "host" else 0
        dense = cache.layers[0].keys.nbytes * 2
        on_host = room if placement == "host" else 0
        assert cache.size.host * 3 * 40 == pytest.approx(on_host)
        assert cache.size.device * 3 * 40 == pytest.approx(dense + room - on_host + packed + held)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_what_completes_attention_counts(llama: PreTrainedModel, ids: Ids, placement: str) -> None:
    """Of two sparse layers, float32: for each row and head sums of keys, values and their products, and a count."""
    config = FasaConfig(n_fac=6)
    cache = FasaCache(llama, profile_of(llama), config, placement=placement)
    with enable(llama, profile_of(llama), config), torch.no_grad():
        llama(ids(80, rows=2), past_key_values=cache)
    size, state = cache.size, 2 * 2 * (8 + 4 * (16 + 16 + 16 * 16 + 16 + 16 * 16))
    for layer in packed_layers(cache):
        assert layer.state.n_bytes == state
        layer.state = None
    for name in ("device", "formula"):
        assert getattr(size, name) - getattr(cache.size, name) == pytest.approx(2 * state / (3 * 2 * 80))
    assert size.host == cache.size.host


def test_a_size_says_in_words_what_is_saved(llama: PreTrainedModel) -> None:
    on_device, on_host = (str(filled(llama, placement=placement).size) for placement in ("device", "host"))
    assert "times the formula's 288.0" in on_device
    assert "saves nothing" not in on_device
    assert on_host.endswith("placement='host' saves nothing for a model on the CPU, where both are host memory.")


# Lower precision.


@pytest.mark.parametrize(
    ("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 1 / 120), ("int4", 1 / 13.9)]
)
def test_a_lower_precision_holds_the_keys_nearly(llama: PreTrainedModel, ids: Ids, dtype: str, error: float) -> None:
    config = FasaConfig(n_fac=6, n_tip=3, packed_dtype=dtype)
    cache = FasaCache(llama, profile_of(llama), config)
    with enable(llama, profile_of(llama), config), torch.no_grad():
        for seed in range(3):
            llama(ids(20, seed=seed, rows=2), past_key_values=cache)
        for layer in packed_layers(cache):
            exact = layer.scorer.pack(layer.keys)
            assert layer.packed.tiles.dtype == (torch.uint8 if dtype == "int4" else getattr(torch, dtype))
            allowed = error * exact.abs().amax(-1, keepdim=True) + 1e-7
            assert ((layer.packed.rows(60).float() - exact).abs() <= allowed).all()


def test_keys_in_integers_cost_their_bits_and_a_scale(llama: PreTrainedModel) -> None:
    sizes = {}
    for dtype in (None, "bfloat16", "int8", "int4"):
        cache = FasaCache(llama, profile_of(llama), FasaConfig(n_tip=3, packed_dtype=dtype), max_cache_len=64)
        with torch.no_grad():
            llama(torch.arange(20)[None], past_key_values=cache)
        sizes[dtype] = packed_layers(cache)[0].packed.n_bytes
    slots = 2 * 64  # heads, slots
    assert sizes == {None: slots * 6 * 4, "bfloat16": slots * 6 * 2, "int8": slots * (6 + 2), "int4": slots * (3 + 2)}


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


def test_impossible_placements_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="disk"):
        FasaCache(llama, profile_of(llama), CONFIG, placement="disk")
