"""Every method inside a model: one forward with a boundary is token-by-token decode; bytes read; other caches."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import generation
import pytest
import torch
from families import tiny
from generation import Ids, generate, left_padded, profile_of
from generation import token_by_token as decoded
from transformers import DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaConfig, FasaProfile, RotaryLayout, enable
from fasa_flex.baselines import Method, adjacent_pairs, scorer_factory
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.scoring import Scorer
from fasa_flex.model.handle import Fasa

METHODS = get_args(Method)
EVICTING = ("snapkv", "h2o", "rkv")


def factory(model: PreTrainedModel, method: str) -> Callable[[int], Scorer]:
    made = profile_of(model)
    if method == "adjacent_pairs":
        made = FasaProfile(made.agreement, adjacent_pairs(RotaryLayout.detect(model)), made.provenance)
    channels = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(3))
    return scorer_factory(method, made, channels=channels)


def under(model: PreTrainedModel, method: str, **settings: object) -> Fasa:
    return enable(model, None, FasaConfig(**{"n_fac": 9, **settings}), scorer=factory(model, method))


close = functools.partial(generation.close, tolerance=2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"n_fac": 0.3}, {"n_sink": 2, "n_recent": 2, "layer_budgets": "pyramid"}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_one_forward_equals_token_by_token(
    llama: PreTrainedModel, ids: Ids, method: str, settings: dict[str, object]
) -> None:
    row, start = ids(48), 25
    with torch.no_grad():
        dense = llama(row[None]).logits[0]
    with under(llama, method, **settings) as fasa:
        expected = decoded(llama, row, start)
        assert fasa.stats.sparse_queries == 2 * (48 - start)
        close(decoded(llama, row, start, cut=11), expected)
        with fasa.sparse_from(torch.tensor([start])), torch.no_grad():
            close(llama(row[None]).logits[0], expected)
    assert (expected[-1] - dense[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["quest", *EVICTING])
def test_a_layer_beside_others_with_a_sliding_window(ids: Ids, method: str) -> None:
    """Their caches drop slots, and masks are additive floats."""
    model, row = tiny("Gemma 3"), ids(48)
    with under(model, method) as fasa:
        expected = decoded(model, row, 25)
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 23, 0]
        with fasa.sparse_from(torch.tensor([25])), torch.no_grad():
            close(model(row[None]).logits[0], expected)


@pytest.mark.parametrize("method", ["quest", *EVICTING])
def test_rows_of_a_batch_do_not_know_each_other(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    """Right-padded rows with boundaries of their own, and generation from left-padded ones."""
    lengths, starts = (48, 41, 29), (20, 38, 15)
    rows = [ids(n, seed=n) for n in lengths]
    batch, mask = torch.zeros(3, 48, dtype=torch.long), torch.zeros(3, 48, dtype=torch.long)
    for b, row in enumerate(rows):
        batch[b, : len(row)], mask[b, : len(row)] = row, 1
    with under(llama, method) as fasa:
        expected = [decoded(llama, row, start) for row, start in zip(rows, starts, strict=True)]
        with fasa.sparse_from(torch.tensor(starts), torch.tensor(lengths)), torch.no_grad():
            for given in (mask, None):
                got = llama(batch, attention_mask=given).logits
                for b, length in enumerate(lengths):
                    close(got[b, :length], expected[b])
        alone = [generate(llama, row[None]) for row in rows]
        tokens, logits = generate(llama, *left_padded(rows))
        for b in range(3):
            assert torch.equal(tokens[b], alone[b][0][0])
            close(logits[b], alone[b][1][0])


@pytest.mark.parametrize("method", ["quest", *EVICTING])
def test_a_static_cache_decodes_the_same(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    row = ids(40)
    with under(llama, method), torch.no_grad():
        expected = decoded(llama, row, 25)
        cache = StaticCache(config=llama.config, max_cache_len=64)
        close(decoded(llama, row, 25, cache), expected)


@pytest.mark.parametrize("method", EVICTING)
def test_values_of_dropped_keys_are_never_read_again(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    row = ids(40)
    with under(llama, method) as fasa, torch.no_grad():
        runs = []
        for spoil in (False, True):
            cache = DynamicCache(config=llama.config)
            for part in (row[:25], row[25:26]):
                llama(part[None], past_key_values=cache)
            if spoil:
                for layer in (1, 2):
                    kept = fasa._layers[layer].scorer.of(cache).kept
                    dropped = torch.ones(1, 2, 26, dtype=torch.bool).scatter_(-1, kept, False)
                    assert dropped.sum(-1).eq(26 - 9).all()
                    cache.layers[layer].values[dropped] = torch.nan
            runs.append(torch.cat([llama(token.view(1, 1), past_key_values=cache).logits for token in row[26:]]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("method", EVICTING)
def test_beam_search_is_refused(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    with under(llama, method), pytest.raises(ValueError, match="begin the sequence anew, without beam search"):
        generate(llama, ids(30, rows=1), num_beams=3)


READS = {
    "streaming_llm": ReadShare(0.0, together=True),
    "oracle": ReadShare(0.5, 0.5),
    "random_chunks": ReadShare(4 / 32),
    "adjacent_pairs": ReadShare(4 / 32),
    "snapkv": ReadShare(0.0, 1.5, together=True),
    "h2o": ReadShare(0.0, together=True),
    "rkv": ReadShare(0.0, 1.5, together=True),
    "quest": ReadShare(2 * 16 / (32 * 16)),
    "sparq": ReadShare(4 / 32),
    "double_sparsity": ReadShare(4 / 32),
    "vattention": ReadShare(4 / 32),
}
"""In numbers of a key and value of 2 * 16 dimensions; a quarter of a key where dimensions are chosen."""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_states_what_it_reads(llama: PreTrainedModel, method: str) -> None:
    scorer = factory(llama, method)(1)
    assert scorer.reads(16, 4, 2) == READS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_beyond_the_context_is_dense_bit_for_bit(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    batch = ids(30, rows=2)
    with torch.no_grad():
        dense = llama(batch).logits
        with under(llama, method, n_fac=30) as fasa, fasa.sparse_from(torch.tensor([5, 9])):
            assert torch.equal(llama(batch).logits, dense)
            assert fasa.stats.sparse_queries == 0


@pytest.mark.parametrize("method", ["random_chunks", "adjacent_pairs", "double_sparsity"])
def test_dimensions_are_on_the_device_of_the_layer(llama: PreTrainedModel, method: str) -> None:
    """There its packed keys are written; the factory knows of no device."""
    made = factory(llama, method)
    with enable(llama.to("meta"), None, FasaConfig(n_fac=9), scorer=made) as fasa:
        assert {layer.scorer.dims.device.type for layer in fasa._layers.values() if layer.scorer} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("method", EVICTING)
def test_what_is_dropped_is_of_each_cache(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    """Two sequences in turn, then a copy of one beside it; each as alone."""
    rows = ids(40, rows=2)
    with under(llama, method) as fasa:
        alone = [decoded(llama, row, 30)[30:] for row in rows]
        caches = [DynamicCache(config=llama.config) for _ in rows]
        for row, cache in zip(rows, caches, strict=True):
            llama(row[None, :30], past_key_values=cache)
        for at in range(30, 40):
            if at == 35:
                caches.append(copy.deepcopy(caches[1]))
            for number, cache in enumerate(caches):
                row = min(number, 1)
                step = llama(rows[row, at].view(1, 1), past_key_values=cache).logits[0, 0]
                torch.testing.assert_close(step, alone[row][at - 30])
        assert fasa.stats.sparse_queries


@pytest.mark.parametrize("method", EVICTING)
def test_what_is_dropped_is_of_each_thread(llama: PreTrainedModel, ids: Ids, method: str) -> None:
    rows, meeting = [ids(40, rows=1, seed=seed) for seed in (1, 2)], threading.Barrier(2, timeout=20)

    def meet(*_: object) -> None:
        meeting.wait()

    with under(llama, method):
        alone = [generate(llama, row) for row in rows]
        turns = llama.model.layers[1].mlp.register_forward_hook(meet)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda row: generate(llama, row), rows))
        turns.remove()
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected)
