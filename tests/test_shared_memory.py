"""Growing layers write in place, but never into what somebody else has a use for, and see what others wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import pytest
import torch
from families import tiny
from filled import assert_packed
from generation import Ids, profile_of
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.hf.compatibility import cache_argument

pytestmark = pytest.mark.filterwarnings("ignore:placement='host' saves nothing")
EVERYTHING = FasaConfig(n_fac=400, n_tip=2, dense_layers=(0,))
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
Mode = Callable[[], AbstractContextManager[object]]


def fork(cache: Cache) -> Cache:
    """A shallow copy: layers of its own that hold the same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def steps(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> Tensor:
    """Logits of tokens, one by one."""
    ids = torch.tensor([tokens])
    logits = [model(ids[:, at : at + 1], **cache_argument(model, cache)).logits for at in range(len(tokens))]
    return torch.cat(logits, 1).detach()


def caches(model: PreTrainedModel, config: FasaConfig) -> dict[str, Callable[[], Cache]]:
    profile = profile_of(model)
    return {
        "plain": lambda: DynamicCache(config=model.config),
        "int8": lambda: FasaCache(model, profile, FasaConfig(n_fac=6, n_tip=2, packed_dtype="int8")),
        "host": lambda: FasaCache(model, profile, config, placement="host"),
    }


@MODES
@pytest.mark.parametrize("kind", ["plain", "host"])
@pytest.mark.parametrize("n_fac", [6, 400])
def test_forks_and_their_original_go_on_apart(
    llama: PreTrainedModel, ids: Ids, n_fac: int, kind: str, mode: Mode
) -> None:
    """In turns, and where one of them is cropped: each as a cache that has never shared anything."""
    config = FasaConfig(n_fac=n_fac, n_tip=2)
    profile, make, prompt = profile_of(llama), caches(llama, config)[kind], ids(40, rows=1)

    def new() -> Cache:
        cache = make()
        llama(prompt, **cache_argument(llama, cache))
        return cache

    with enable(llama, profile, config), mode():
        original = new()
        forks, said = [original], [[3, 4, 5]]
        steps(llama, original, said[0])

        def go_on(which: int, *tokens: int) -> None:
            said[which].extend(tokens)
            got = steps(llama, forks[which], list(tokens))
            expected = steps(llama, new(), said[which])[:, -len(tokens) :]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

        def take_a_fork() -> None:
            forks.append(fork(original))
            said.append(list(said[0]))

        take_a_fork()
        go_on(0, 5, 6)
        go_on(1, 7)
        go_on(0, 8)
        go_on(1, 9, 10)
        take_a_fork()
        original.crop(-4)
        said[0] = said[0][:-4]
        take_a_fork()
        go_on(0, 11, 12)
        for which in (2, 3, 1, 0):
            go_on(which, 13 + which)
        for cache in forks:
            assert_packed(cache)


@pytest.mark.parametrize("kind", ["plain", "int8", "host"])
@torch.no_grad()
def test_what_a_user_keeps_does_not_change(llama: PreTrainedModel, ids: Ids, kind: str) -> None:
    make = caches(llama, EVERYTHING)[kind]
    with enable(llama, profile_of(llama), EVERYTHING):
        cache = make()
        llama(ids(60, rows=1), **cache_argument(llama, cache))
        steps(llama, cache, [3, 4])
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        before = [(keys.clone(), values.clone()) for keys, values in kept]
        cache.crop(-30)
        steps(llama, cache, [5, 6, 7, 8, 9])
        for (keys, values), (keys_before, values_before) in zip(kept, before, strict=True):
            assert torch.equal(keys, keys_before)
            assert torch.equal(values, values_before)


@torch.no_grad()
def test_a_cropped_cache_that_nobody_else_holds_goes_on_in_place(llama: PreTrainedModel, ids: Ids) -> None:
    """As speculative decoding crops it, round by round."""
    with enable(llama, profile_of(llama), EVERYTHING):
        cache = DynamicCache(config=llama.config)
        llama(ids(60, rows=1), **cache_argument(llama, cache))
        steps(llama, cache, [3])
        places = [layer.keys.data_ptr() for layer in cache.layers[1:]]
        for _ in range(3):
            llama(ids(4, rows=1), **cache_argument(llama, cache))
            cache.crop(-3)
        assert [layer.keys.data_ptr() for layer in cache.layers[1:]] == places


@MODES
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_keys_that_are_written_to_in_place_are_packed_anew(
    llama: PreTrainedModel, ids: Ids, static: bool, mode: Mode
) -> None:
    """One's own reordering of beams: as keys that were always in this order."""

    def run(prompt: Tensor, token: Tensor, order: Tensor | None = None) -> Tensor:
        cache = StaticCache(config=llama.config, max_cache_len=64) if static else DynamicCache(config=llama.config)
        for chunk in (prompt, token):
            llama(chunk, **cache_argument(llama, cache))
        with torch.no_grad():
            for layer in cache.layers if order is not None else ():
                layer.keys[:] = layer.keys[order]
                layer.values[:] = layer.values[order]
        logits: Tensor = llama(torch.tensor([[7], [8], [9]]), **cache_argument(llama, cache)).logits.detach()
        assert_packed(cache)
        return logits

    prompt, token, order = ids(40, rows=3), torch.tensor([[4], [5], [6]]), torch.tensor([2, 0, 0])
    with enable(llama, profile_of(llama), FasaConfig(n_fac=6, n_tip=2)), mode():
        expected, got = run(prompt[order], token[order]), run(prompt, token, order)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_writes_that_are_not_counted_are_followed_by_repack(llama: PreTrainedModel, ids: Ids) -> None:
    """As `FasaCache` says of ``.data``: unseen until its layer packs its keys anew."""
    profile, config = profile_of(llama), FasaConfig(n_fac=6, n_tip=2)
    with enable(llama, profile, config):
        cache = FasaCache(llama, profile, config)
        llama(ids(40, rows=1), **cache_argument(llama, cache))
        for layer in cache.layers[1:]:
            layer.keys.data.neg_()
            layer.repack(layer.scorer)
        assert_packed(cache)
        steps(llama, cache, [3])
        assert_packed(cache)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
def test_a_static_cache_of_inference_mode_is_reset_and_cropped_outside(
    ids: Ids, name: str, place: Literal["device", "host"], made_in: Mode
) -> None:
    """Its sliding layers, too; afterwards it fills as it did before."""
    model, config = tiny(name), FasaConfig(n_fac=6, n_tip=2)
    profile, prompt = profile_of(model), ids(30, rows=1)
    with enable(model, profile, config):
        with made_in():
            cache = FasaCache(model, profile, config, placement=place, max_cache_len=64)
        with torch.inference_mode():
            model(prompt, **cache_argument(model, cache))
            expected = steps(model, cache, [3, 4])
        cache.reset()
        with torch.no_grad():
            model(prompt, **cache_argument(model, cache))
            torch.testing.assert_close(steps(model, cache, [3, 4]), expected)
            if name == "Llama":
                cache.crop(-1)
                torch.testing.assert_close(steps(model, cache, [4]), expected[:, 1:])
