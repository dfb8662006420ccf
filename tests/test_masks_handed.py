"""What a model hands to its attention: masks that are no causal ones, masks by head, and weights that are asked for."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from generation import Ids, profile_of
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.masks import last_valid, valid_numbers

CONFIG = FasaConfig(n_fac=6, n_tip=2, dense_layers=())


def lengths(cache: Cache) -> list[int]:
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


def caches(model: PreTrainedModel, profile: FasaProfile) -> dict[str, Cache]:
    return {
        "growing": DynamicCache(config=model.config),
        "growing packed": FasaCache(model, profile, CONFIG),
        "static": StaticCache(config=model.config, max_cache_len=60),
        "static packed": FasaCache(model, profile, CONFIG, max_cache_len=60),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "keys"), [("growing", 42), ("growing packed", 42), ("static", 60), ("static packed", 60)]
)
def test_a_mask_of_other_queries_or_keys_is_refused_before_the_cache_is_written(
    llama: PreTrainedModel, ids: Ids, kind: str, keys: int
) -> None:
    """A mask without the cache's keys, as long as the other kind of cache has it, or that would be broadcast."""
    profile, prompt = profile_of(llama), ids(42, rows=1)
    with enable(llama, profile, CONFIG):
        cache = caches(llama, profile)[kind]
        llama(prompt[:, :40], **cache_argument(llama, cache))
        others = [(1, 1, 2, length) for length in (2, 102 - keys, 41, 1)]
        for shape in (*others, (1, 1, 1, keys), (2, 1, 2, keys)):
            mask = torch.ones(shape, dtype=torch.bool)
            with pytest.raises(ValueError, match=rf"shape \({shape[0]}, 1, .*pass \(1, 1, 2, {keys}\)"):
                llama(prompt[:, 40:], attention_mask=mask, **cache_argument(llama, cache))
            assert lengths(cache) == [40, 40, 40]
        causal = (torch.arange(keys) <= torch.tensor([[40], [41]]))[None, None]
        both = llama(prompt[:, 40:], attention_mask=causal, **cache_argument(llama, cache)).logits
        torch.testing.assert_close(both, llama(prompt).logits[:, 40:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_with_a_sliding_window_have_masks_of_their_own(ids: Ids) -> None:
    """Layer 0's, which is what a forward is checked by, ends where the window does; a user's is as long as that."""
    model = tiny("Gemma 2")
    prompt = ids(40, rows=1)
    with enable(model, profile_of(model), CONFIG):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=60)):
            mask = torch.ones(1, 40, dtype=torch.long)
            model(prompt, attention_mask=mask, **cache_argument(model, cache))
            padded = torch.ones(1, 42, dtype=torch.long)
            model(prompt[:, :2], attention_mask=padded, **cache_argument(model, cache))
            assert lengths(cache) == [42, 42, 42]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "growing packed", "static", "static packed"])
def test_a_refusal_in_a_later_layer_leaves_the_cache_as_it_was(llama: PreTrainedModel, ids: Ids, kind: str) -> None:
    """NaN in the keys of layer 1, when layer 0 is written: the same forward is right as soon as its cause is mended."""
    profile, prompt = profile_of(llama), ids(45, rows=1)
    weight = llama.model.layers[1].self_attn.k_proj.weight
    with enable(llama, profile, CONFIG):
        cache, untouched = caches(llama, profile)[kind], caches(llama, profile)[kind]
        for held, stop in ((cache, 0), (untouched, 0), (cache, 40), (untouched, 40)):
            if stop:
                llama(prompt[:, :stop], **cache_argument(llama, held))
            if held is cache:
                sound = weight.clone()
                weight.fill_(torch.nan)
                with pytest.raises(ValueError, match="keys of layer 1 hold NaN"):
                    llama(prompt[:, stop : stop + 4], **cache_argument(llama, held))
                weight.copy_(sound)
                assert lengths(held) == [stop] * 3 or (not stop and sum(lengths(held)) == 0)
        for part in (prompt[:, 40:44], prompt[:, 44:]):
            expected = llama(part, **cache_argument(llama, untouched)).logits
            torch.testing.assert_close(llama(part, **cache_argument(llama, cache)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, FasaConfig(n_fac=8, n_tip=2), FasaConfig(n_fac=8, prefill="sparse")])
def test_nan_in_the_padding_of_a_row_spoils_this_row_alone(
    llama: PreTrainedModel, ids: Ids, config: FasaConfig
) -> None:
    """As under dense attention, where a masked logit of NaN is NaN; NaN elsewhere is refused."""
    mask = torch.ones(2, 42, dtype=torch.long)
    mask[1, :5] = 0
    sound = llama.get_input_embeddings()(ids(42, rows=2))
    spoilt = torch.where(mask[..., None] == 0, torch.nan, sound)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(states: torch.Tensor) -> torch.Tensor:
        cache, parts = DynamicCache(config=llama.config), []
        for start, stop in ((0, 40), (40, 41), (41, 42)):
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(llama(inputs_embeds=states[:, start:stop], **given, **cache_argument(llama, cache)).logits)
        return torch.cat(parts, 1)

    assert logits(spoilt)[1].isnan().all()
    with enable(llama, profile_of(llama), config):
        expected, got = logits(sound), logits(spoilt)
        torch.testing.assert_close(got[0], expected[0])
        assert got[1].isnan().all()
        with pytest.raises(ValueError, match="keys of layer 0 hold NaN"):
            logits(torch.where(torch.arange(42)[:, None] == 20, torch.nan, sound))
    with enable(llama, config=CONFIG) as fasa:  # which calibrates on the other row
        long = torch.cat([ids(150, rows=2), ids(42, rows=2)], 1)
        real = torch.ones_like(long)
        real[1, :5] = 0
        states = torch.where(real[..., None] == 0, torch.nan, llama.get_input_embeddings()(long))
        llama(inputs_embeds=states, attention_mask=real, **cache_argument(llama, DynamicCache(config=llama.config)))
        assert fasa.profile is not None
        assert all(table.isfinite().all() for table in fasa.profile.tables().values())


@torch.no_grad()
def test_where_a_cache_cannot_be_cropped_a_refusal_says_what_it_holds(ids: Ids) -> None:
    model = tiny("Gemma 2")
    cache = DynamicCache(config=model.config)
    with enable(model, profile_of(model), CONFIG):
        model(ids(40, rows=1), **cache_argument(model, cache))
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"layer 1 hold NaN.*; layers 0 to 1 of the cache hold .* new cache\.$"):
            model(ids(4, rows=1), **cache_argument(model, cache))


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
    mask = torch.tensor([[[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]], [[1, 0, 0, 0, 0], [1, 0, 1, 1, 0]]]).bool()
    for given in (mask[:, None], torch.where(mask[:, None], 0.0, torch.finfo(torch.float32).min)):
        assert last_valid(given, (2, 2, 5), device).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]
        assert valid_numbers(given, (2, 2, 5), device).tolist() == [[0, 1, 2, 2, 2], [1, 1, 2, 3, 3]]
