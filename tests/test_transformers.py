"""enable: FASA inside Hugging Face models, against dense attention and against a decode written with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import plain, unrounded
from generation import NEW, PROMPT, Attention, Ids, decode_reader, generate, left_padded, profile_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable

# A budget of everything is dense attention, to the bit.


@pytest.mark.parametrize("n_fac", [4096, PROMPT + NEW, 1.0])
def test_full_budget_is_bit_identical_to_dense(model: PreTrainedModel, ids: Ids, n_fac: float) -> None:
    prompt = ids(PROMPT, rows=1)
    tokens, logits = generate(model, prompt)
    with enable(model, profile_of(model), FasaConfig(n_fac=n_fac, dense_layers=())) as fasa:
        sparse_tokens, sparse_logits = generate(model, prompt)
        assert fasa.stats.sparse_queries == 0
        assert fasa.stats.kv_share == 1.0
    assert torch.equal(sparse_tokens, tokens)
    assert torch.equal(sparse_logits, logits)


def test_full_budget_samples_the_same_tokens(model: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(PROMPT, rows=1)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    tokens, _ = generate(model, prompt, **options)
    with enable(model, profile_of(model), FasaConfig(n_fac=4096)):
        assert torch.equal(generate(model, prompt, **options)[0], tokens)
    assert not torch.equal(tokens, generate(model, prompt)[0])  # it did sample


def test_full_budget_in_a_left_padded_batch(model: PreTrainedModel, ids: Ids) -> None:
    prompts, mask = left_padded([ids(n, seed=n) for n in (PROMPT, 29, 13)])
    tokens, logits = generate(model, prompts, mask)
    with enable(model, profile_of(model), FasaConfig(n_fac=4096, dense_layers=())):
        sparse_tokens, sparse_logits = generate(model, prompts, mask)
    assert torch.equal(sparse_tokens, tokens)
    assert torch.equal(sparse_logits, logits)


def test_full_budget_beam_search_equals_dense(llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(PROMPT, rows=2)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    dense = llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with enable(llama, profile_of(llama), FasaConfig(n_fac=4096)):
        assert torch.equal(llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options), dense)


# A small budget is the method.

CONFIGS = [
    plain(n_fac=6),
    plain(n_fac=0.2, n_tip=3, dense_layers=()),
    plain(n_fac=8, n_sink=2, n_recent=3, dense_layers=(0, 2)),
    plain(n_fac=5, per="query_head", n_tip=3),
    plain(n_fac=5, group_reduce="none"),
    plain(n_fac=5, group_reduce="mean", backend="reference"),
    plain(n_fac=5, group_reduce="softmax", backend="gather"),
    unrounded(n_fac=16),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_fac} {c.n_sink}+{c.n_recent} {c.per} {c.group_reduce}")
def test_small_budget_equals_the_reference_decode(
    model: PreTrainedModel, ids: Ids, attention: Attention, config: FasaConfig
) -> None:
    prompt, profile = ids(PROMPT, rows=1), profile_of(model)
    dense_logits = generate(model, prompt)[1]
    with attention(model, decode_reader(model, profile, config)):
        expected_tokens, expected = generate(model, prompt)
    with enable(model, profile, config):
        tokens, logits = generate(model, prompt)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert (expected - dense_logits).abs().max() > 0.1  # the budget matters here, so the comparison says something


@pytest.mark.slow
def test_flex_inside_a_model_equals_gather(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, profile = ids(70, rows=1), profile_of(llama)
    results = []
    for backend in ("gather", "flex"):
        with enable(llama, profile, unrounded(n_fac=6, n_sink=1, backend=backend)):
            results.append(generate(llama, prompt, max_new_tokens=2))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [unrounded(n_fac=6, n_sink=1, n_recent=2), unrounded(n_fac=0.2)], ids=["tokens", "share"]
)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=["greedy", "sampled from one"])
def test_left_padded_batch_equals_its_rows_alone(
    model: PreTrainedModel, ids: Ids, config: FasaConfig, options: dict[str, Any]
) -> None:
    rows = [ids(n, seed=n) for n in (PROMPT, 29, 13)]
    with enable(model, profile_of(model), config):
        tokens, logits = generate(model, *left_padded(rows), **options)
        for b, row in enumerate(rows):
            alone, alone_logits = generate(model, row[None], **options)
            assert torch.equal(tokens[b], alone[0])
            torch.testing.assert_close(logits[b], alone_logits[0], atol=2e-4, rtol=1e-4)


def test_sampling_with_a_small_budget_is_reproducible(llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(PROMPT, rows=2)
    with enable(llama, profile_of(llama), FasaConfig(n_fac=6)):
        first, second = (generate(llama, prompt, do_sample=True, top_k=0)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_scorer_of_ones_own_replaces_the_profile(llama: PreTrainedModel, ids: Ids, attention: Attention) -> None:
    """The full score as scorer is the method with all chunks."""

    def full_score(layer: int) -> Callable[..., Tensor]:
        def score(query: Tensor, key: Tensor, packed_keys: Tensor | None = None) -> Tensor:
            grouped = query.unflatten(1, (key.shape[1], -1))
            return (grouped @ key.unsqueeze(2).mT).float()

        return score

    prompt, config = ids(PROMPT, rows=1), plain(n_fac=6)
    profile = profile_of(llama)
    with attention(llama, decode_reader(llama, profile, plain(n_fac=6, n_tip=8))):
        expected_tokens, expected = generate(llama, prompt)
    with enable(llama, None, config, scorer=full_score):
        tokens, logits = generate(llama, prompt)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_second_turn_sees_the_whole_cache(llama: PreTrainedModel, ids: Ids) -> None:
    """Several tokens on a cache that is not empty: dense over everything, as `prefill="dense"` says."""
    first, second = ids(20, rows=1), ids(7, seed=1, rows=1)

    def turn() -> Tensor:
        cache = DynamicCache(config=llama.config)
        llama(first, past_key_values=cache)
        return llama(second, past_key_values=cache).logits

    with torch.no_grad():
        expected = turn()
        with enable(llama, profile_of(llama), FasaConfig(n_fac=3)):
            assert torch.equal(turn(), expected)


def test_sparse_prefill_lets_every_query_select(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, profile = ids(24, rows=2), profile_of(llama)
    with torch.no_grad():
        dense = llama(prompt).logits
        with enable(llama, profile, FasaConfig(n_fac=4)) as fasa, fasa.sparse_from(torch.zeros(2, dtype=torch.long)):
            expected = llama(prompt).logits
        with enable(llama, profile, FasaConfig(n_fac=4, prefill="sparse")) as fasa:
            sparse = llama(prompt).logits
            assert fasa.stats.sparse_queries == 2 * 2 * (24 - 4)  # rows, sparse layers, queries with more than 4 keys
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(sparse[:, :4], dense[:, :4], atol=1e-4, rtol=1e-4)
    assert (sparse[:, 4:] - dense[:, 4:]).abs().max() > 0.1
