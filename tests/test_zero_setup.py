"""enable without a profile: dense until a long prompt, calibrated inside it, as with that profile from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import unrounded
from families import FAMILIES, tiny
from filled import assert_packed
from generation import Ids, generate, left_padded, profile_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaConfig, FasaProfile, RotaryLayout, contextual_agreement, enable
from fasa_flex.caches.packed_layers import PackedLayer
from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.calibration.from_prompt import LEAST_KEYS, Sample
from fasa_flex.core import criteria

PROMPT, NEW = 160, 6
CONFIG = FasaConfig(n_fac=16)


def causal(length: int, rows: int = 1) -> Tensor:
    return torch.arange(1, length + 1).expand(rows, -1)


# What is measured.


@pytest.mark.parametrize("heads", [2, 6])
def test_where_nothing_is_left_out_it_is_contextual_agreement(heads: int) -> None:
    """128 keys: all are looked at with K = 32, so that distinct scores give the very same sets."""
    layout = RotaryLayout.half_split(8)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, n, 128, 8, generator=generator) for n in (heads, 2))
    sample = Sample.of(None, causal(128, rows=2), None, 128)
    assert sample is not None
    assert (sample.top_k, sample.slots.shape) == (32, (2, 128))
    got = sample.agreement(q, k, layout)
    each = [contextual_agreement(q[:, :, : i + 1][:, :, -1:], k[:, :, : i + 1], layout, 32) for i in sample.queries[0]]
    torch.testing.assert_close(got, torch.stack(each).double().mean(0), atol=1e-6, rtol=0)
    assert 0.2 < float(got.min()) < float(got.max()) < 0.8


def test_with_sampled_keys_it_is_near_contextual_agreement() -> None:
    """2048 keys, of which 256 are looked at: the counts of 4 queries' top 32 scatter by a few hundredths."""
    layout = RotaryLayout.half_split(16)
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(0.3, 2, 8).repeat(2)  # a chunk's two dimensions alike, chunks differently
    q, k = (torch.randn(1, 2, 2048, 16, generator=generator) * scale for _ in range(2))
    sample = Sample.of(None, causal(2048), None, 2048)
    assert sample is not None
    assert sample.slots.shape[1] == 256
    got, exact = sample.agreement(q, k, layout), contextual_agreement(q[:, :, -4:], k, layout, 256)
    assert (got - exact).abs().mean() < 0.04
    assert (got - exact).abs().max() < 0.12
    assert exact.max() - exact.min() > 0.3  # so the bound tells chunks apart


def test_the_statistics_of_the_logits_are_estimated_from_the_same_sample() -> None:
    """Exact where nothing is left out, near where every eighth key is looked at."""
    layout = RotaryLayout.half_split(16)
    generator = torch.Generator().manual_seed(4)
    scale = torch.linspace(0.3, 2, 8).repeat(2)
    for length, error in ((128, 1e-6), (2048, 0.4)):
        q, k = (torch.randn(1, n, length, 16, generator=generator) * scale + 1 for n in (4, 2))
        sample = Sample.of(None, causal(length), None, length)
        assert sample is not None
        got = sample.statistics(q, k, layout, 0.25)
        exact = criteria.logit_statistics(q[:, :, -4:], k, criteria.causal(4, length, q.device), layout.chunks, 0.25)
        torch.testing.assert_close(got.variance, exact.variance, rtol=error, atol=0)
        torch.testing.assert_close(got.mean_key, exact.mean_key, rtol=error, atol=0.2 if error > 0.1 else 1e-6)
        assert exact.variance.amax() > 20 * exact.variance.amin()


def test_equal_scores_agree_with_nothing_in_particular() -> None:
    """A chunk whose keys are all zero takes K keys of its own choice, not all: it agrees by chance at most."""
    layout = RotaryLayout.half_split(8)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 1, 256, 8, generator=generator), torch.randn(1, 1, 256, 8, generator=generator)
    k[..., layout.chunks[2]] = 0
    sample = Sample.of(None, causal(256), None, 256)
    assert sample is not None
    assert sample.agreement(q, k, layout)[0, 2] < 0.45


@pytest.mark.parametrize("left", [True, False], ids=["left padding", "right padding"])
def test_padding_is_never_looked_at(left: bool) -> None:
    slots = torch.arange(200)
    real = torch.stack([slots >= 60, slots >= 0, slots >= 190] if left else [slots < 140, slots >= 0, slots < 10])
    mask = (slots <= slots[:, None]) & real[:, None, None]
    sample = Sample.of(mask, mask.sum(-1)[:, 0], None, 200)
    assert sample is not None
    rows = sample.rows.tolist()
    assert 1 in rows
    assert 2 not in rows  # ten tokens say nothing
    for row, queries, keys, visible in zip(rows, sample.queries, sample.slots, sample.visible, strict=True):
        assert real[row, queries].all()
        assert real[row, keys].all()
        assert len(set(queries.tolist())) == len(queries)
        assert torch.equal(visible, mask[row, 0, queries][:, keys])
        assert int(queries.max()) == int(real[row].nonzero().max())


def test_a_short_prompt_says_nothing() -> None:
    assert Sample.of(None, causal(LEAST_KEYS - 1), None, LEAST_KEYS - 1) is None
    assert Sample.of(None, causal(LEAST_KEYS), None, LEAST_KEYS) is not None
    sparse = torch.arange(200)[None] >= 100  # only the first hundred queries are dense
    assert Sample.of(None, causal(200), sparse, 200) is None


# What a model does with it.


def test_a_prompt_calibrates_and_decoding_is_that_of_the_profile_it_made(
    model: PreTrainedModel, ids: Ids, tmp_path: Path
) -> None:
    prompt = ids(PROMPT, rows=2)
    dense = generate(model, prompt, max_new_tokens=NEW)
    with enable(model, config=CONFIG) as fasa:
        assert fasa.profile is None
        tokens, logits = generate(model, prompt, max_new_tokens=NEW)
        assert fasa.profile is not None
        fasa.profile.save_pretrained(tmp_path)
        counts = fasa.stats.as_dict()
        assert fasa.stats.sparse_queries == 2 * 2 * (NEW - 1)
    profile = FasaProfile.from_pretrained(tmp_path)
    assert profile.provenance.sample_hashes == ("the last queries of a prompt of 160 tokens",)
    assert profile.provenance.max_new_tokens == 0
    assert profile.variance is not None
    assert profile.covariance is not None
    assert (profile.agreement > 0).all()  # the dense layer 0 too
    assert (profile.variance > 0).all()
    diagonal = profile.covariance.diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(diagonal, profile.variance.unflatten(1, (diagonal.shape[1], -1)).mean(2))
    with enable(model, profile, CONFIG) as fasa:
        expected = generate(model, prompt, max_new_tokens=NEW)
        assert fasa.stats.as_dict() == counts
        assert fasa.profile is profile
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
    assert torch.equal(logits[:, 0], dense[1][:, 0])  # the prefill was dense
    assert (logits - dense[1]).abs().max() > 0.01
    assert torch.equal(generate(model, prompt, max_new_tokens=NEW)[1], dense[1])  # disabled, all is as before


def test_short_prompts_stay_dense_and_the_first_long_one_decides(llama: PreTrainedModel, ids: Ids) -> None:
    short, long, other = ids(40, rows=1), ids(PROMPT, seed=1, rows=1), ids(PROMPT, seed=2, rows=1)
    dense = generate(llama, short, max_new_tokens=NEW)[1]

    def is_dense() -> bool:
        """Layer 0 decodes by grouped attention, so within rounding."""
        return torch.allclose(generate(llama, short, max_new_tokens=NEW)[1], dense, rtol=1e-4, atol=1e-4)

    with enable(llama, config=CONFIG) as fasa:
        assert is_dense()
        assert (fasa.profile, fasa.stats.sparse_queries) == (None, 0)
        generate(llama, long, max_new_tokens=2)
        first = fasa.profile
        generate(llama, other, max_new_tokens=2)
        assert fasa.profile is first
        assert not is_dense()
        fasa.recalibrate()
        assert fasa.profile is None
        assert is_dense()
        generate(llama, other, max_new_tokens=2)
        assert first is not None
        assert fasa.profile is not None
        assert not torch.equal(fasa.profile.agreement, first.agreement)


def test_a_cache_is_packed_from_the_first_step_and_anew_after_recalibration(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, token = ids(PROMPT, rows=1), ids(1, seed=3, rows=1)
    for cache in (DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=400)):
        kind = PackedLayer if isinstance(cache, DynamicCache) else StaticPackedLayer
        with enable(llama, config=CONFIG) as fasa, torch.no_grad():
            llama(prompt, past_key_values=cache)
            assert [isinstance(layer, kind) for layer in cache.layers] == [False, True, True]
            for seed in (1, 2):
                llama(token, past_key_values=cache)
                assert cache.layers[1].scorer is fasa._layers[1].scorer
                assert_packed(cache)
                fasa.recalibrate()
                llama(ids(PROMPT, seed=seed, rows=1))  # another sequence, without a cache


def test_chunked_prefill_calibrates_on_the_first_chunk_that_is_long_enough(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, known = ids(200, rows=1), []
    with enable(llama, config=CONFIG) as fasa, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        for part in prompt.split([100, 50, 50], dim=1):
            llama(part, past_key_values=cache)
            known.append(fasa.profile)
        assert known[0] is None
        assert known[1] is known[2] is not None
        assert known[1].provenance.sample_hashes == ("the last queries of a prompt of 150 tokens",)
        llama(prompt[:, :1], past_key_values=cache)
        assert fasa.stats.sparse_queries == 2
        fasa.recalibrate()
        llama(prompt[:, :150], use_cache=False)
        assert fasa.profile.provenance.queries == known[1].provenance.queries


def test_padding_on_the_left_changes_no_chunk(llama: PreTrainedModel, ids: Ids) -> None:
    rows = [ids(PROMPT), ids(20, seed=1)]
    with enable(llama, config=CONFIG) as fasa, torch.no_grad():
        prompts, mask = left_padded([*rows, ids(200, seed=2)])
        generate(llama, prompts[:2, 40:], mask[:2, 40:], max_new_tokens=NEW)
        assert fasa.profile is not None
        batch = fasa.profile
        fasa.recalibrate()
        generate(llama, prompts[:1], mask[:1], max_new_tokens=2)
        padded = fasa.profile
        fasa.recalibrate()
        generate(llama, rows[0][None], max_new_tokens=2)
        alone = fasa.profile
    torch.testing.assert_close(batch.agreement, alone.agreement, atol=0.01, rtol=0)
    torch.testing.assert_close(padded.agreement, alone.agreement, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["Gemma 3", "SmolLM3 (layers without RoPE)", "DeepSeek-V3 (MLA)", "GLM", "gpt-oss"])
def test_families_measure_the_layers_that_may_be_sparse(name: str, ids: Ids) -> None:
    model = tiny(name)
    config = FasaConfig(n_fac=16, dense_layers=())
    with enable(model, config=config) as fasa:
        tokens, logits = generate(model, ids(PROMPT, rows=1), max_new_tokens=NEW)
        profile, dense = fasa.profile, fasa.dense_layers
        assert profile is not None
        assert profile.layout.chunks.tolist() == FAMILIES[name].pairs
        for tables in (profile.agreement, profile.variance, profile.covariance, profile.mean_key):
            assert [bool(table.any()) for table in tables] == [layer not in dense for layer in range(3)]
        assert fasa.stats.sparse_queries == (3 - len(dense)) * (NEW - 1)
    with enable(model, profile, config) as fasa:
        assert fasa.dense_layers == dense
        expected = generate(model, ids(PROMPT, rows=1), max_new_tokens=NEW)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])


@pytest.mark.parametrize("static", [False, True])
def test_a_boundary_calibrates_on_what_is_before_it_and_is_sparse_behind(
    llama: PreTrainedModel, ids: Ids, static: bool
) -> None:
    rows = ids(PROMPT + 20, rows=2)
    starts = torch.tensor([PROMPT, PROMPT + 5])

    def cache() -> Any:
        return StaticCache(config=llama.config, max_cache_len=300) if static else None

    with enable(llama, config=CONFIG) as fasa, torch.no_grad():
        with fasa.sparse_from(starts):
            got = llama(rows, past_key_values=cache()).logits
        profile = fasa.profile
        assert fasa.stats.sparse_queries == 2 * (20 + 15)
        fasa.recalibrate()
        with fasa.sparse_from(starts):
            changed = rows.clone()
            changed[0, PROMPT:], changed[1, PROMPT + 5 :] = 5, 6
            llama(changed, past_key_values=cache())
        assert torch.equal(fasa.profile.agreement, profile.agreement)  # what is behind does not calibrate
    with enable(llama, profile, CONFIG) as fasa, fasa.sparse_from(starts), torch.no_grad():
        assert torch.equal(llama(rows, past_key_values=cache()).logits, got)


def test_a_boundary_at_the_beginning_leaves_nothing_to_calibrate_on(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, config=CONFIG) as fasa, fasa.sparse_from(torch.tensor([0])), torch.no_grad():
        llama(ids(PROMPT, rows=1))
        assert fasa.profile is None
        assert fasa.stats.sparse_queries == 0


def test_a_forward_that_broke_off_leaves_nothing_half_measured(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, other = ids(PROMPT, rows=1), ids(PROMPT + 7, seed=1, rows=1)
    with enable(llama, config=CONFIG) as fasa, torch.no_grad():
        llama(prompt)
        expected = fasa.profile
        fasa.recalibrate()

        def fail(*_: object) -> None:
            raise KeyError

        hook = llama.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            llama(other)
        hook.remove()
        assert fasa.profile is None
        llama(prompt)
        assert torch.equal(fasa.profile.agreement, expected.agreement)


@pytest.mark.parametrize("config", [FasaConfig(n_fac=16, per="query_head"), FasaConfig(n_fac=16, n_tip=3)], ids=str)
def test_sets_are_those_of_the_profile(llama: PreTrainedModel, ids: Ids, config: FasaConfig) -> None:
    with enable(llama, config=config) as fasa, torch.no_grad():
        llama(ids(PROMPT, rows=1))
        n_tip = config.chunks_of(16)
        assert fasa.profile is not None
        for layer in (1, 2):
            assert fasa.profile.variance is not None
            table = fasa.profile.variance[layer].double().numpy()
            chosen = oracle.dominant(table, n_tip, 2 if config.per == "kv_head" else None)
            dims = RotaryLayout.half_split(16).chunks[torch.from_numpy(chosen)]
            assert fasa._layers[layer].scorer.dims.tolist() == dims.flatten(1).tolist()


@pytest.mark.slow
def test_a_compiled_decode_follows_an_eager_prefill(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, compiled = ids(PROMPT, rows=1), torch.compile(llama, fullgraph=True, backend="aot_eager")

    def decode(model: PreTrainedModel) -> Tensor:
        cache = StaticCache(config=llama.config, max_cache_len=400)
        llama(prompt, past_key_values=cache)
        return torch.cat([model(ids(1, seed=step, rows=1), past_key_values=cache).logits for step in range(3)])

    with enable(llama, config=unrounded(n_fac=16)) as fasa, torch.inference_mode():
        expected = decode(llama)
        fasa.recalibrate()
        torch.testing.assert_close(decode(compiled), expected, atol=1e-4, rtol=1e-4)
        assert fasa.stats.sparse_queries == 2 * 2 * 3
        fasa.recalibrate()
        with pytest.raises(Exception, match="cannot calibrate itself on its prompt"):
            compiled(prompt)


def test_where_there_is_nothing_to_recalibrate_it_says_so(llama: PreTrainedModel) -> None:
    with enable(llama, profile_of(llama)) as fasa, pytest.raises(ValueError, match="only enable"):
        fasa.recalibrate()


def test_what_a_profile_refuses_is_refused_without_one(
    llama: PreTrainedModel, gpt2: PreTrainedModel, make_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(ValueError, match=r"n_tip must lie in 1\.\.8"):
        enable(llama, config=FasaConfig(n_tip=9))
    with pytest.raises(ValueError, match="dense_layers names layer 3"):
        enable(llama, config=FasaConfig(dense_layers=(3,)))
    with pytest.raises(ValueError, match="no RoPE"):
        enable(gpt2)
    assert llama.config._attn_implementation == "sdpa"
