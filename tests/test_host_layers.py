"""FASA-M: keys and values in host memory change no result, and where that runs out nothing is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import plain
from filled import CONFIG, assert_holds, assert_packed, filled, held, packed_layers
from generation import Ids, profile_of
from sentences import raises_sentence
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.caches.host_layers import HostLayer, StaticHostLayer
from fasa_flex.caches.pinned_memory import host_memory, settle
from fasa_flex.hf.compatibility import cache_argument


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (HostLayer, {}),
        (HostLayer, {"num_beams": 3}),
        (HostLayer, {"prompt_lookup_num_tokens": 3}),
        (StaticHostLayer, {}),
        (StaticHostLayer, {"num_beams": 3}),
        (StaticHostLayer, {"prompt_lookup_num_tokens": 3}),
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


@pytest.mark.parametrize(("length", "crops"), [(None, True), (64, True), (64, False)])
def test_rows_held_of_the_host_follow_what_happens_to_the_cache(
    llama: PreTrainedModel, length: int | None, crops: bool
) -> None:
    """What the device holds must never be a row of another token, or of another row of the batch."""
    cache = filled(llama, placement="host", max_cache_len=length)
    for layer in packed_layers(cache):
        held = layer.resident
        assert (tuple(held.slots.shape), tuple(held.keys.shape)) == ((2, 2, 6), (2, 2, 6, 16))
        held.slots.copy_(torch.arange(24).view(2, 2, 6))
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer in packed_layers(cache):
        assert layer.resident.slots[0].equal(layer.resident.slots[1])
        assert layer.resident.slots[0, 0, 0] == 12
    if crops:
        cache.crop(-4)
    else:
        cache.reset()
    assert all((layer.resident.slots == -1).all() for layer in packed_layers(cache))


def test_a_static_cache_in_host_memory_forgets_rows_that_a_longer_forward_may_overwrite(
    llama: PreTrainedModel, ids: Ids
) -> None:
    cache = filled(llama, placement="host", max_cache_len=64)
    layer = packed_layers(cache)[0]
    layer.resident.slots.fill_(3)
    with torch.no_grad():
        llama(ids(2, rows=2), past_key_values=cache)
    assert (layer.resident.slots == -1).all()
    assert layer.resident.length is layer.cumulative_length


@pytest.mark.parametrize("length", [None, 64])
def test_a_token_has_its_key_and_its_value_side_by_side(llama: PreTrainedModel, ids: Ids, length: int | None) -> None:
    """After a prefill, a step, a reordering and another step."""
    cache = filled(llama, placement="host", max_cache_len=length)
    with torch.no_grad():
        llama(ids(1, rows=2), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        llama(ids(1, rows=2), past_key_values=cache)
    for layer in packed_layers(cache):
        keys, values = layer.keys, layer.values
        assert values.data_ptr() - keys.data_ptr() == 16 * keys.element_size()
        assert keys.stride() == values.stride()
        assert keys.stride(2) == 32


# Memory that runs out.


@contextmanager
def short_of_memory(at: int, packed: bool = False) -> Iterator[list[str]]:
    """The ``at``-th allocation of host memory fails, with ``packed`` or of larger packed keys; yields those tried."""
    tried: list[str] = []

    def failing(real: Callable[..., Tensor], counts: Callable[..., bool], where: str) -> Callable[..., Tensor]:
        def allocate(*args: Any, **options: Any) -> Tensor:
            if counts(options):
                tried.append(where)
                if len(tried) == at:
                    raise RuntimeError("out of memory\nwhere: in a stack of C++")
            return real(*args, **options)

        return allocate

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "zeros", failing(torch.zeros, lambda options: "pin_memory" in options, "host"))
        if packed:
            patched.setattr(
                "fasa_flex.core.packed_keys.F.pad", failing(torch.nn.functional.pad, lambda _: True, "device")
            )
        yield tried


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_layer_that_cannot_grow_is_as_before(llama: PreTrainedModel, at: int) -> None:
    """Whichever of keys with values, packed keys and their scales cannot."""
    config = FasaConfig(n_fac=6, n_tip=3, packed_dtype="int8")
    cache = FasaCache(llama, profile_of(llama), config, placement="host")
    with torch.no_grad():
        llama(torch.arange(40).view(2, 20) % 60 + 1, past_key_values=cache)
        layer, before = packed_layers(cache)[0], held(cache)
        new = torch.randn(2, 2, 2, 300, 16).unbind()
        with (
            short_of_memory(at, packed=True) as tried,
            pytest.raises((ValueError, RuntimeError), match="out of memory"),
        ):
            layer.update(*new)
        assert tried == ["host", "device", "device"][:at]
        assert_holds(cache, before)
        layer.update(*new)
    assert layer.keys.shape == layer.values.shape == (2, 2, 320, 16)
    assert layer.packed.scales.flatten(2).shape[2] >= 320


@pytest.mark.parametrize("at", [1, 2])
def test_layers_stay_in_step_where_one_cannot_grow(llama: PreTrainedModel, ids: Ids, at: int) -> None:
    """Two layers in host memory, one allocation each; the first layer is dense and on the device."""
    cache, other = (filled(llama, placement="host") for _ in range(2))
    before = held(cache)
    with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
        with (
            short_of_memory(at),
            raises_sentence(ValueError, match=r"no .* \(out of memory\); keep"),
        ):
            llama(ids(300, rows=2), past_key_values=cache)
        assert_holds(cache, before)
        logits = [llama(ids(300, rows=2), past_key_values=each).logits for each in (cache, other)]
    assert torch.equal(*logits)
    assert_packed(cache)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("length", [None, 64])
def test_a_cache_that_cannot_be_filled_is_empty_again(
    llama: PreTrainedModel, ids: Ids, length: int | None, at: int
) -> None:
    """Tried again, with another number of rows too, it holds the prompt once."""
    new = {"placement": "host", "max_cache_len": length}
    cache, kind = FasaCache(llama, profile_of(llama), CONFIG, **new), HostLayer if length is None else StaticHostLayer
    with torch.no_grad():
        with short_of_memory(at), raises_sentence(ValueError, match=r"the host has no .* placement='device'"):
            llama(ids(20, rows=2), past_key_values=cache)
        assert cache.get_seq_length() == 0
        logits = [
            llama(ids(20, rows=3), past_key_values=each).logits
            for each in (cache, FasaCache(llama, profile_of(llama), CONFIG, **new))
        ]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [20] * 3
    assert [type(layer) is kind for layer in cache.layers] == [False, True, True]
    assert torch.equal(*logits)
    assert_packed(cache)


def test_what_the_host_lacks_is_one_sentence() -> None:
    with short_of_memory(1), pytest.raises(ValueError, match=r"no 480 bytes of memory .* \(out of memory\);") as error:
        host_memory((2, 3, 4, 5), torch.float32, torch.device("cpu"))
    assert str(error.value).count("\n") == 0


# What the device writes and the host reads.


def test_the_host_waits_for_a_device_that_writes_into_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stream = type("Stream", (), {"synchronize": lambda self: waited.append("synchronize")})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waited.append(device) or stream)
    settle(torch.zeros(1), torch.device("cpu"))
    assert not waited
    settle(torch.zeros(1), torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0), "synchronize"]


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: [layer.reserve(300) for layer in packed_layers(cache)],
        lambda cache: [layer.repack(replace(layer.scorer, dtype="int8")) for layer in packed_layers(cache)],
    ],
    ids=["reorder", "repeat", "select", "grow", "repack"],
)
def test_every_change_of_a_layer_in_host_memory_waits_for_the_device(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, read: Callable[[FasaCache], object]
) -> None:
    cache, waited = filled(llama, placement="host"), []
    keys = [layer.keys for layer in packed_layers(cache)]
    monkeypatch.setattr(
        "fasa_flex.caches.keeps_packed_keys.settle", lambda states, device: waited.append((states, device.type))
    )
    read(cache)
    assert [device for _, device in waited] == ["cpu"] * len(waited)
    assert all(any(states is layer_keys for states, _ in waited) for layer_keys in keys)


# What it saves.


@pytest.mark.parametrize(("head_dim", "n_fac"), [(128, 256), (64, 64)])
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_the_device_holds_little_more_than_the_formula(
    make_model: Callable[..., PreTrainedModel], head_dim: int, n_fac: int, dtype: Any
) -> None:
    """t * 2 * n_tip + n_fac * 2 d numbers a key/value head and layer, at any length that it grows through."""
    model = make_model("Qwen3", head_dim=head_dim)
    config = plain(n_fac=n_fac, dense_layers=(), packed_dtype=dtype)
    cache = FasaCache(model, profile_of(model), config, placement="host")
    layer, token = cache.layers[0], {None: head_dim, "int8": head_dim // 4 + 2, "int4": head_dim // 8 + 2}[dtype]
    worst, length = 0.0, 0
    for step in (1, 20, 12, 40, *[31] * 30, *[333] * 12, 4000, 4500, *[97] * 20, 18000, 1, 2100):
        new = torch.zeros(1, 2, step, head_dim)
        layer.update(new, new)
        length += step
        formula = 2 * (length * token + n_fac * 2 * head_dim * 4)
        worst = max(worst, (layer.packed.n_bytes + layer.resident.n_bytes) / formula)
    assert length > 32768
    assert 1 < worst <= 1.1


def test_a_host_cache_of_a_model_on_the_cpu_is_a_warning(llama: PreTrainedModel) -> None:
    profile = profile_of(llama)
    with pytest.warns(UserWarning, match="saves nothing for a model on the CPU") as caught:
        cache = FasaCache(llama, profile, CONFIG, placement="host")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FasaCache(llama, profile, CONFIG)
        with torch.no_grad():
            llama(torch.arange(20)[None], **cache_argument(llama, cache))
