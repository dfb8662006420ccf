"""Completion in models: every way of reaching a token gives the one result, whatever has happened to its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import unrounded
from conftest import token_ids
from families import tiny
from filled import packed_layers
from generation import Ids, generate, left_padded, profile_of
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.baselines import Quest, SparQ
from fasa_flex.model.handle import Fasa

PROMPT, LENGTH, SLOTS = 118, 134, 160  # decoding begins in the second block of 64 and ends in the third
CONFIG = unrounded(n_fac=12, n_tip=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("Llama")


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel) -> FasaProfile:
    return profile_of(model, mean_key=True)


@pytest.fixture
def fasa(model: PreTrainedModel, profile: FasaProfile) -> Iterator[Fasa]:
    with enable(model, profile, CONFIG) as handle, torch.no_grad():
        yield handle


def at_once(model: PreTrainedModel, fasa: Fasa, rows: Tensor) -> Tensor:
    """Logits of all tokens, those behind the prompt sparse, in one forward: what all others are to equal."""
    with fasa.sparse_from(torch.full((len(rows),), PROMPT)):
        return model(rows).logits


def read(model: PreTrainedModel, cache: Cache, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Logits of tokens that are read in parts of these sizes, the rest one by one."""
    sizes = (*sizes, *[1] * (rows.shape[1] - sum(sizes)))
    return torch.cat([model(part, past_key_values=cache).logits for part in rows.split(sizes, dim=1)], dim=1)


CACHES: dict[str, Callable[[PreTrainedModel, FasaProfile], Cache]] = {
    "growing": lambda model, profile: DynamicCache(config=model.config),
    "static": lambda model, profile: StaticCache(config=model.config, max_cache_len=SLOTS),
    "FASA-C": lambda model, profile: FasaCache(model, profile, CONFIG),
    "FASA-M": lambda model, profile: FasaCache(model, profile, CONFIG, placement="host"),
    "static FASA-M": lambda model, profile: FasaCache(model, profile, CONFIG, placement="host", max_cache_len=SLOTS),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, model: PreTrainedModel, profile: FasaProfile) -> Cache:
    made: Cache = CACHES[request.param](model, profile)
    return made


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("sizes", [(PROMPT,), (40, 24, 54)], ids=str)
def test_decoding_is_one_forward_of_many_queries(
    model: PreTrainedModel, fasa: Fasa, cache: Cache, sizes: tuple[int, ...]
) -> None:
    rows = token_ids(LENGTH, rows=1)
    expected = at_once(model, fasa, rows)
    same(read(model, cache, rows, sizes), expected)
    assert all(int(layer.state.covered[0, 0]) == 128 for layer in packed_layers(cache))


def test_it_matters_here(model: PreTrainedModel, profile: FasaProfile) -> None:
    """Or the tests of this file could not fail: from the prompt on, and from token to token."""
    rows, results = token_ids(LENGTH, rows=1), []
    for changes in ({}, {"completion": "none"}, {"completion": "mean"}, {"completion_strength": 0.5}):
        with enable(model, profile, replace(CONFIG, **changes)) as fasa, torch.no_grad():
            results.append(at_once(model, fasa, rows)[:, PROMPT:])
    for other in results[1:]:
        assert (other - results[0]).abs().amax(-1).min() > 1e-3 * float(results[0].abs().max())


def test_decoding_from_the_first_token(model: PreTrainedModel, fasa: Fasa, cache: Cache) -> None:
    rows = token_ids(67, rows=1)
    with fasa.sparse_from(torch.tensor([0])):
        expected = model(rows).logits
    same(read(model, cache, rows, ()), expected)


def test_sparse_parts_of_a_prompt_are_decoding(model: PreTrainedModel, fasa: Fasa) -> None:
    """As speculative decoding verifies: several sparse queries on a cache, of one block or of two."""
    rows, cache = token_ids(LENGTH, rows=2), DynamicCache(config=model.config)
    expected = at_once(model, fasa, rows)
    with fasa.sparse_from(torch.tensor([PROMPT, PROMPT])):
        same(read(model, cache, rows, (108, 15, 8, 3)), expected)


def test_tokens_that_are_taken_back_leave_nothing(model: PreTrainedModel, fasa: Fasa, cache: Cache) -> None:
    """Within a block, past its end, and at last to below the first one's."""
    rows, wrong = token_ids(LENGTH, rows=1), token_ids(40, seed=9, rows=1)
    expected, done = at_once(model, fasa, rows), 0
    for to, tokens in ((122, 10), (126, 1), (LENGTH, 3)):
        part = read(model, cache, rows[:, done:to], () if done else (PROMPT,))
        same(part, expected[:, done:to])
        read(model, cache, wrong[:, :tokens], ())
        cache.crop(-tokens)
        done = to
    cache.crop(30 - LENGTH)
    same(read(model, cache, rows[:, 30:], (PROMPT - 30,)), expected[:, 30:])


@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers], [0, 1]),
    ],
    ids=["reorder", "one row twice", "repeat", "select", "offload"],
)
@pytest.mark.parametrize("name", ["growing", "FASA-M", "static"])
def test_it_follows_the_rows_of_a_cache(
    model: PreTrainedModel,
    profile: FasaProfile,
    fasa: Fasa,
    name: str,
    change: Callable[[Cache], Any],
    order: list[int],
) -> None:
    if name == "static" and len(order) != 2:
        pytest.skip("a static cache keeps its rows")
    rows, cache = token_ids(LENGTH, rows=2), CACHES[name](model, profile)
    first = read(model, cache, rows[:, :124], (PROMPT,))
    change(cache)
    expected = at_once(model, fasa, rows[order])
    same(first[order], expected[:, :124])
    same(read(model, cache, rows[order][:, 124:], ()), expected[:, 124:])


def test_an_emptied_cache_begins_anew(model: PreTrainedModel, fasa: Fasa, cache: Cache) -> None:
    read(model, cache, token_ids(LENGTH, seed=5, rows=1), (PROMPT,))
    cache.reset()
    rows = token_ids(LENGTH, rows=1)
    same(read(model, cache, rows, (PROMPT,)), at_once(model, fasa, rows))


def test_a_prefix_serves_many_continuations(model: PreTrainedModel, fasa: Fasa, cache: Cache) -> None:
    """Copied, it is as it was; a suffix of one token is decoded, one of several is prompt."""
    rows = token_ids(LENGTH, rows=1)
    read(model, cache, rows[:, :PROMPT], (PROMPT,))
    for seed in range(2):
        row = torch.cat([rows[:, :PROMPT], token_ids(LENGTH - PROMPT, seed=seed, rows=1)], dim=1)
        same(read(model, copy.deepcopy(cache), row[:, PROMPT:], ()), at_once(model, fasa, row)[:, PROMPT:])


@pytest.mark.parametrize("name", ["growing", "static", "FASA-M"])
def test_a_padded_batch_is_its_rows_alone(model: PreTrainedModel, profile: FasaProfile, fasa: Fasa, name: str) -> None:
    """Rows that have a state from the prompt on, while they decode, and never; generated, and padded on the right."""
    lengths, new = (110, 57, 20), 12
    rows = [token_ids(length, seed=length) for length in lengths]
    options = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    tokens, logits = generate(model, *left_padded(rows), past_key_values=CACHES[name](model, profile), **options)
    alone = [generate(model, row[None], **options) for row in rows]
    for b, (alone_tokens, alone_logits) in enumerate(alone):
        assert tokens[b].equal(alone_tokens[0])
        same(logits[b], alone_logits[0])
    ids, mask = torch.zeros(3, 110, dtype=torch.long), torch.arange(110) < torch.tensor(lengths)[:, None]
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    cache, mask = CACHES[name](model, profile), F.pad(mask.long(), (0, new - 1), value=1)
    model(ids, attention_mask=mask[:, :110], past_key_values=cache)
    for step in range(new - 1):
        options = {"attention_mask": mask[:, : 111 + step], "position_ids": torch.tensor(lengths)[:, None] + step}
        step_logits = model(tokens[:, step, None], past_key_values=cache, **options).logits
        same(step_logits[:, -1], logits[:, step + 1])


def test_beams_and_proposed_tokens_go_by_the_same_attention(model: PreTrainedModel, fasa: Fasa, ids: Ids) -> None:
    prompt, options = ids(120, rows=1), {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    plain = generate(model, prompt, **options)[0]
    with fasa.sparse_from(torch.tensor([120])):
        looked_up = generate(model, prompt, prompt_lookup_num_tokens=3, **options)[0]
    assert looked_up.equal(plain)
    by_cache = [
        generate(model, prompt, num_beams=3, past_key_values=CACHES[name](model, fasa.profile), **options)[0]
        for name in ("growing", "FASA-C", "FASA-M")
    ]
    assert by_cache[0].equal(by_cache[1])
    assert by_cache[0].equal(by_cache[2])


def test_a_cache_filled_while_dense_is_completed_from_the_first_step(model: PreTrainedModel, fasa: Fasa) -> None:
    """Other covered tokens, too, that came while no attention of ours saw them."""
    rows, cache = token_ids(LENGTH, rows=1), DynamicCache(config=model.config)
    other = torch.cat([rows[:, :50], token_ids(LENGTH - 50, seed=3, rows=1)], dim=1)
    first = at_once(model, fasa, rows)[:, PROMPT:]
    with fasa.sparse_from(torch.tensor([130])):
        second = model(other).logits[:, 130:]
    fasa.disable()
    model(rows[:, :PROMPT], past_key_values=cache)
    with enable(model, fasa.profile, CONFIG):
        same(read(model, cache, rows[:, PROMPT:], ()), first)
    cache.crop(50 - LENGTH)
    model(other[:, 50:130], past_key_values=cache)
    with enable(model, fasa.profile, CONFIG):
        same(read(model, cache, other[:, 130:], ()), second)


def test_a_strength_of_zero_is_the_mean_value(model: PreTrainedModel, profile: FasaProfile) -> None:
    rows, results = token_ids(LENGTH, rows=1), []
    for changes in ({"completion": "mean"}, {"completion_strength": 0.0}, {}):
        with enable(model, profile, unrounded(n_fac=12, n_tip=3, **changes)) as fasa, torch.no_grad():
            cache = DynamicCache(config=model.config)
            results.append(read(model, cache, rows, (PROMPT,)))
            same(at_once(model, fasa, rows), results[-1])
            widths = {layer.state.covariance.shape[2] for layer in packed_layers(cache)}
            assert widths == ({16} if not changes else {0})
    assert torch.equal(*results[:2])
    assert not torch.equal(*results[1:])


@pytest.mark.parametrize("asked", ["first_order", "mean"])
def test_scores_that_are_no_logits_complete_nothing(model: PreTrainedModel, asked: Any) -> None:
    with pytest.raises(ValueError, match=f"completion='{asked}' needs scores that estimate logits, .* Quest") as error:
        enable(model, config=FasaConfig(completion=asked), scorer=lambda layer: Quest(4))
    assert str(error.value).count(".") == 1
    for scorer in (Quest(4), SparQ(4)):  # without a state a step would read every key and value
        with enable(model, config=unrounded(n_fac=12), scorer=lambda layer, scorer=scorer: scorer) as fasa:
            assert fasa.completion == "none"
    with enable(model, config=unrounded(n_fac=12, completion=asked), scorer=lambda layer: SparQ(4)) as fasa:
        assert fasa.completion == asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_in_all_ways_nearly_alike(dtype: torch.dtype) -> None:
    """The default's four bits, too; logits are off by what rounding makes of them, and far less than without."""
    model, rows = tiny("Llama").to(dtype), token_ids(LENGTH, rows=1)
    profile = profile_of(model, mean_key=True)
    with enable(model, profile, FasaConfig(n_fac=12)) as fasa, torch.no_grad():
        cache = DynamicCache(config=model.config)
        decoded, whole = read(model, cache, rows, (PROMPT,))[:, PROMPT:], at_once(model, fasa, rows)[:, PROMPT:]
    assert {layer.state.covariance.dtype for layer in packed_layers(cache)} == {dtype}
    assert decoded.isfinite().all()
    with enable(model, profile, FasaConfig(n_fac=12, completion="none")) as fasa, torch.no_grad():
        without = at_once(model, fasa, rows)[:, PROMPT:]
    assert (decoded - whole).norm() < 0.5 * (whole - without).norm()
