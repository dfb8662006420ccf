"""Room in caches: a full one is a sentence before anything is written, whatever layer would notice it first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filled import CONFIG, assert_holds, assert_packed, filled, held
from generation import Ids, profile_of
from sentences import raises_sentence
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.caches.capacity import CountedStaticLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.hf.compatibility import cache_argument

SLOTS = 24
MAKE: dict[str, Callable[[PreTrainedModel, FasaConfig], Cache]] = {
    "device": lambda model, config: FasaCache(model, profile_of(model), config, max_cache_len=SLOTS),
    "host": lambda model, config: FasaCache(model, profile_of(model), config, placement="host", max_cache_len=SLOTS),
    "plain": lambda model, _: StaticCache(config=model.config, max_cache_len=SLOTS),
}


@pytest.mark.parametrize("dense", [(0,), (), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(("kind", "enabled"), [("device", False), ("device", True), ("host", True), ("plain", True)])
def test_a_full_static_cache_is_a_sentence_and_as_before(
    llama: PreTrainedModel, ids: Ids, kind: str, enabled: bool, dense: tuple[int, ...]
) -> None:
    config = FasaConfig(n_fac=6, n_tip=3, dense_layers=dense)
    cache = MAKE[kind](llama, config)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if enabled:
            stack.enter_context(enable(llama, profile_of(llama), config))
        with pytest.raises(ValueError, match=rf"holds 0 of at most {SLOTS} tokens and 30 more"):
            llama(ids(30, rows=2), past_key_values=cache)
        assert cache.get_seq_length() == 0
        for length, tokens in ((0, 20), (20, 4)):
            before = held(cache) if length else []
            with raises_sentence(ValueError, match=rf"holds {length} of at most {SLOTS} tokens and 25 more"):
                llama(ids(25, rows=2), past_key_values=cache)
            assert_holds(cache, before) if length else None
            llama(ids(tokens, rows=2), past_key_values=cache)
        before = held(cache)
        assert [length for length, _ in before] == [SLOTS] * 3
        with pytest.raises(ValueError, match=rf"holds {SLOTS} of at most {SLOTS} tokens and 1 more"):
            llama(ids(1, rows=2), past_key_values=cache)
        assert_holds(cache, before)


@pytest.mark.parametrize("kind", [*MAKE, "growing", "growing, packed", "growing, host"])
def test_every_cache_crops_a_negative_number_of_tokens(llama: PreTrainedModel, ids: Ids, kind: str) -> None:
    """As transformers' own do; its static ones cannot before 5.24."""
    profile, (first, wrong, right) = profile_of(llama), (ids(n, seed=n, rows=2) for n in (20, 5, 3))
    growing = {
        "growing": lambda: DynamicCache(config=llama.config),
        "growing, packed": lambda: FasaCache(llama, profile, CONFIG),
        "growing, host": lambda: FasaCache(llama, profile, CONFIG, placement="host"),
    }
    cache = growing[kind]() if kind in growing else MAKE[kind](llama, CONFIG)
    expected = DynamicCache(config=llama.config)
    with torch.no_grad(), enable(llama, profile, CONFIG):
        llama(first, **cache_argument(llama, expected))
        llama(first, **cache_argument(llama, cache))
        for token in wrong[:, :4].split(1, dim=1):
            llama(token, **cache_argument(llama, cache))
        for refused in (1, 20):
            with pytest.raises(ValueError, match=rf"negative|Please use a negative.*{refused}"):
                cache.layers[1].crop(refused)
        cache.crop(-4)
        cache.crop(0)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [20] * 3
        assert_packed(cache)
        for token in right.split(1, dim=1):
            got, wanted = (llama(token, **cache_argument(llama, held)).logits for held in (cache, expected))
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert_packed(cache)
        cache.crop(-60)
        assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("kind", MAKE)
def test_generation_past_the_end_of_a_static_cache_is_that_sentence(
    llama: PreTrainedModel, ids: Ids, kind: str
) -> None:
    cache = MAKE[kind](llama, CONFIG)
    run: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with enable(llama, profile_of(llama), CONFIG):
        with pytest.raises(ValueError, match=rf"holds {SLOTS} of at most {SLOTS} tokens and 1 more"):
            llama.generate(ids(20, rows=1), past_key_values=cache, **run)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [SLOTS] * 3
        assert_packed(cache)


@pytest.mark.parametrize("kind", MAKE)
def test_layers_with_a_window_do_not_go_ahead_of_a_full_one(
    make_model: Callable[..., PreTrainedModel], ids: Ids, kind: str
) -> None:
    """Gemma's first layers have one, and never fill up."""
    model = make_model("Gemma 3")
    cache = MAKE[kind](model, CONFIG)
    with enable(model, profile_of(model), CONFIG), torch.no_grad():
        model(ids(20, rows=1), past_key_values=cache)
        with pytest.raises(ValueError, match=rf"holds 20 of at most {SLOTS} tokens and 5 more"):
            model(ids(5, rows=1), past_key_values=cache)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [20] * 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", MAKE)
def test_compiled_steps_are_counted(llama: PreTrainedModel, ids: Ids, kind: str) -> None:
    """They count on the device alone; the first eager call after them must know."""
    cache = MAKE[kind](llama, CONFIG)
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
        llama(ids(20, rows=1), past_key_values=cache)
        for seed in range(SLOTS - 20):
            compiled(ids(1, seed=seed, rows=1), past_key_values=cache)
        assert all(layer.written is None for layer in cache.layers)
        before = held(cache)
        with pytest.raises(ValueError, match=rf"holds {SLOTS} of at most {SLOTS} tokens and 1 more"):
            llama(ids(1, rows=1), past_key_values=cache)
    assert_holds(cache, before)


class Count(SimpleNamespace):
    """A token count on an accelerator: reading it stalls."""

    reads = 0
    is_cuda = True

    def __int__(self) -> int:
        self.reads += 1
        return self.tokens


def test_an_accelerator_is_asked_for_its_count_only_where_the_host_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    layer = CountedStaticLayer(10)
    layer.cumulative_length = count = Count(tokens=3)
    layer.reserve(1)
    assert count.reads == 1
    for _ in range(3):
        layer.reserve(1)
    assert (layer.written, count.reads) == (3, 1)
    layer.written = None  # as a compiled step leaves it
    layer.reserve(1)
    assert count.reads == 2
    with pytest.raises(ValueError, match="holds 3 of at most 10"):
        layer.reserve(8)
    assert count.reads == 3  # the device has the last word

    capturing = True
    layer.reserve(8)
    assert (layer.captured, count.reads) == (True, 3)
    capturing, count.tokens = False, 10  # replayed meanwhile
    with pytest.raises(ValueError, match="holds 10 of at most 10"):
        layer.reserve(1)


def test_the_layers_of_a_static_cache_count_and_stay_what_they_are(llama: PreTrainedModel) -> None:
    """A graph that was compiled for them would be compiled anew for others."""
    cache = FasaCache(llama, profile_of(llama), CONFIG, max_cache_len=SLOTS)
    kinds = [CountedStaticLayer, StaticPackedLayer, StaticPackedLayer]
    assert [type(layer) for layer in cache.layers] == kinds
    with torch.no_grad(), enable(llama, profile_of(llama), CONFIG):
        llama(torch.arange(20)[None], past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == kinds
    assert [type(layer) for layer in filled(llama, max_cache_len=SLOTS).layers] == kinds
