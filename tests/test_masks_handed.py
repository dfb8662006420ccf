"""What a model hands to its attention: masks that are no causal ones, masks by head, and weights that are asked for."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from generation import Ids, profile_of
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.expectations import cache_argument
from fasa_flex.masking import last_valid, valid_numbers

CONFIG = FasaConfig(n_fac=6, n_tip=2, dense_layers=())


def lengths(cache: DynamicCache) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_decoder_used_bidirectionally_selects_among_all_keys(ids: Ids, implementation: str, backend: str) -> None:
    """Without a mask as with one of all keys; padding then changes nothing."""
    model, prompt = tiny("Qwen3"), ids(40, rows=1)
    profile = profile_of(model)
    model.set_attn_implementation(implementation)
    causal = model(prompt).logits
    model.config.is_causal = False
    dense = model(prompt).logits
    assert (dense - causal).abs().max() > 1
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], 1), torch.ones(1, 45, dtype=torch.long)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for n_fac in (12, 40):
        config = FasaConfig(n_fac=n_fac, n_tip=3, dense_layers=(), prefill="sparse", backend=backend)
        with enable(model, profile, config) as fasa:
            sparse = model(prompt).logits
            assert fasa.stats.sparse_queries == (3 * 40 if n_fac == 12 else 0)
            every = (
                torch.ones(1, 1, 40, 40, dtype=torch.bool) if implementation == "sdpa" else torch.zeros(1, 1, 40, 40)
            )
            torch.testing.assert_close(sparse, model(prompt, attention_mask=every).logits, atol=1e-4, rtol=1e-4)
            behind = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
            torch.testing.assert_close(sparse, behind, atol=1e-4, rtol=1e-4)
        if n_fac == 40:
            torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_by_head_is_refused_before_the_cache_is_written(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, profile_of(llama), CONFIG):
        cache = DynamicCache(config=llama.config)
        llama(ids(40, rows=1), **cache_argument(llama, cache))
        with pytest.raises(ValueError, match=r"one set of valid keys for all heads.*\(1, 4, 1, 41\)"):
            llama(ids(1, rows=1), attention_mask=torch.zeros(1, 4, 1, 41), **cache_argument(llama, cache))
        assert lengths(cache) == [40, 40, 40]
        llama(ids(1, rows=1), **cache_argument(llama, cache))
        assert lengths(cache) == [41, 41, 41]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_every_layer_of_a_sparse_step_returns_its_weights(llama: PreTrainedModel, ids: Ids, backend: str) -> None:
    """Three matrices a step, in order: dense in layer 0, of the selected keys alone in the others."""
    profile = profile_of(llama)
    llama.set_attn_implementation("eager")
    with enable(llama, profile, FasaConfig(n_fac=6, n_tip=2, backend=backend)):
        cache = DynamicCache(config=llama.config)
        llama(ids(40, rows=1), **cache_argument(llama, cache))
        step = llama(ids(1, rows=1), output_attentions=True, **cache_argument(llama, cache))
    assert [tuple(weights.shape) for weights in step.attentions] == [(1, 4, 1, 41)] * 3
    assert [(weights > 0).sum(-1).unique().tolist() for weights in step.attentions] == [[41], [6], [6]]
    for weights in step.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 1))


@torch.no_grad()
def test_weights_of_one_forward_with_a_boundary_are_those_of_its_steps(llama: PreTrainedModel, ids: Ids) -> None:
    profile, prompt = profile_of(llama), ids(40, rows=1)
    llama.set_attn_implementation("eager")
    with enable(llama, profile, FasaConfig(n_fac=6, n_tip=2)) as fasa:
        cache = DynamicCache(config=llama.config)
        llama(prompt[:, :38], **cache_argument(llama, cache))
        steps = [
            llama(prompt[:, at : at + 1], output_attentions=True, **cache_argument(llama, cache)) for at in (38, 39)
        ]
        with fasa.sparse_from(torch.tensor([38])):
            whole = llama(prompt, output_attentions=True)
    for layer, weights in enumerate(whole.attentions):
        assert weights.shape == (1, 4, 40, 40)
        for at, step in zip((38, 39), steps, strict=True):
            expected = step.attentions[layer][:, :, 0]
            torch.testing.assert_close(weights[:, :, at, : at + 1], expected, atol=1e-5, rtol=1e-4)


def test_the_keys_of_a_forwards_last_query_written_out() -> None:
    """Without a mask a first prefill has as many as it has tokens, in a buffer of any length; one token has all."""
    device = torch.device("cpu")
    assert last_valid(None, (1, 3, 5), device).int().tolist() == [[1, 1, 1, 0, 0]]
    assert last_valid(None, (1, 1, 5), device).int().tolist() == [[1] * 5]
    mask = torch.tensor([[[0, 1, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1]], [[1, 0, 0, 0, 0, 1], [1, 0, 1, 1, 0, 1]]]).bool()
    for given in (mask[:, None], torch.where(mask[:, None], 0.0, torch.finfo(torch.float32).min)):
        assert last_valid(given, (2, 2, 5), device).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]
        assert valid_numbers(given, (2, 2, 5), device).tolist() == [[0, 1, 2, 2, 2], [1, 1, 2, 3, 3]]
