"""enable: reversible, side by side, counted, and refused where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from generation import NEW, PROMPT, Ids, generate, left_padded, profile_of
from sentences import raises_sentence
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, enable

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

# Reversible, and side by side.


def test_disable_gives_the_model_back_bit_identical(model: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(PROMPT, rows=2)
    before = generate(model, prompt)
    implementation, forward = model.config._attn_implementation, type(model).forward
    keys = set(model.state_dict())
    fasa = enable(model, profile_of(model), FasaConfig(n_fac=3))
    during = generate(model, prompt)
    fasa.disable()
    after = generate(model, prompt)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(during[1], before[1])
    assert model.config._attn_implementation == implementation
    assert type(model).forward is forward
    assert set(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_disabling_twice_does_nothing_and_enabling_again_works(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, profile = ids(PROMPT, rows=1), profile_of(llama)
    results = []
    for _ in range(2):
        fasa = enable(llama, profile, FasaConfig(n_fac=4))
        results.append(generate(llama, prompt)[1])
        fasa.disable()
        fasa.disable()
    assert torch.equal(*results)


def test_the_context_manager_disables_after_an_error(llama: PreTrainedModel) -> None:
    def fail() -> None:
        with enable(llama, profile_of(llama)):
            assert llama.model.layers[1].self_attn.config._attn_implementation != "sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert llama.model.layers[1].self_attn.config is llama.config


def test_eager_attention_is_supported_and_restored(make_model: Callable[..., PreTrainedModel], ids: Ids) -> None:
    model, prompt = make_model("Llama"), ids(PROMPT, rows=1)
    profile = profile_of(model)
    with enable(model, profile, FasaConfig(n_fac=5)):
        expected = generate(model, prompt)
    model.set_attn_implementation("eager")
    dense = generate(model, prompt)
    with enable(model, profile, FasaConfig(n_fac=5)):
        tokens, logits = generate(model, prompt)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=2e-4, rtol=1e-4)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, prompt)[1], dense[1])


def test_two_models_with_two_configs_do_not_meet(make_model: Callable[..., PreTrainedModel], ids: Ids) -> None:
    prompt = ids(PROMPT, rows=1)
    setups = [
        (make_model("Llama"), FasaConfig(n_fac=4)),
        (make_model("Llama"), FasaConfig(n_fac=9, per="query_head", dense_layers=())),
        (make_model("Qwen3"), FasaConfig(n_fac=0.3, group_reduce="mean")),
    ]
    alone, profiles = [], []
    for model, config in setups:
        profiles.append(profile_of(model))
        with enable(model, profiles[-1], config):
            alone.append(generate(model, prompt))
    assert not torch.equal(alone[0][1], alone[1][1])

    handles = [enable(model, profile, config) for (model, config), profile in zip(setups, profiles, strict=True)]
    together = [generate(model, prompt) for model, _ in setups]
    handles[1].disable()  # one leaving does not disturb the others
    together[2] = generate(setups[2][0], prompt)
    for expected, got in zip(alone, together, strict=True):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert [handle.stats.sparse_queries for handle in handles] == [2 * (NEW - 1), 3 * (NEW - 1), 2 * 2 * (NEW - 1)]
    for handle in handles:
        handle.disable()


def test_enabling_an_enabled_model_is_refused(llama: PreTrainedModel, ids: Ids) -> None:
    profile = profile_of(llama)
    with enable(llama, profile, FasaConfig(n_fac=4)):
        before = generate(llama, ids(PROMPT, rows=1))
        with pytest.raises(ValueError, match=r"under FASA already, by .* Fasa\(.*n_fac=4.*\); disable\(\)"):
            enable(llama, profile, FasaConfig(n_fac=5))
        assert torch.equal(generate(llama, ids(PROMPT, rows=1))[1], before[1])
    assert llama.config._attn_implementation == "sdpa"


def test_an_enabled_model_saves_as_the_model_it_was(llama: PreTrainedModel, ids: Ids, tmp_path: Path) -> None:
    prompt = ids(PROMPT, rows=1)
    dense = generate(llama, prompt)[1]
    with enable(llama, profile_of(llama), FasaConfig(n_fac=4)):
        llama.save_pretrained(tmp_path)
    assert "fasa" not in (tmp_path / "config.json").read_text()
    loaded = type(llama).from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, prompt)[1], dense)


def test_global_random_state_is_untouched(llama: PreTrainedModel, ids: Ids) -> None:
    profile, prompt = profile_of(llama), ids(PROMPT, rows=1)
    state = torch.get_rng_state()
    with enable(llama, profile, FasaConfig(n_fac=4)), torch.no_grad():
        llama(prompt)
    assert torch.equal(torch.get_rng_state(), state)


# What it says it did.


def test_stats_count_queries_by_layer_and_start_anew(llama: PreTrainedModel, ids: Ids) -> None:
    """40 prompt tokens, 12 new: 11 decode steps, as the last token is not fed; layer 0 is dense."""
    steps = NEW - 1
    with enable(llama, profile_of(llama), FasaConfig(n_fac=4)) as fasa:
        generate(llama, ids(PROMPT, rows=1))
        stats = fasa.stats
        assert stats.dense_queries == 3 * PROMPT + steps
        assert stats.sparse_queries == 2 * steps
        assert [layer.dense_queries for layer in stats.per_layer] == [PROMPT + steps, PROMPT, PROMPT]
        assert [layer.sparse_queries for layer in stats.per_layer] == [0, steps, steps]
        assert stats.kv_share == pytest.approx(4 * steps / sum(range(PROMPT + 1, PROMPT + NEW)))
        stats.reset()
        assert (fasa.stats.dense_queries, fasa.stats.sparse_queries, fasa.stats.kv_share) == (0, 0, 1.0)
        generate(llama, ids(PROMPT, rows=1))
        assert fasa.stats.sparse_queries == 2 * steps
    assert fasa.stats.sparse_queries == 2 * steps  # still readable after the end


def test_stats_leave_padding_out(llama: PreTrainedModel, ids: Ids) -> None:
    lengths, steps = (PROMPT, 29, 13), NEW - 1
    with enable(llama, profile_of(llama), FasaConfig(n_fac=0.5)) as fasa:
        generate(llama, *left_padded([ids(n, seed=n) for n in lengths]))
        assert fasa.stats.dense_queries == 3 * sum(lengths) + 3 * steps
        assert fasa.stats.sparse_queries == 3 * 2 * steps
        valid = [n + i for n in lengths for i in range(1, NEW)]
        share = sum(int(np.ceil(0.5 * n)) for n in valid) / sum(valid)
        assert fasa.stats.kv_share == pytest.approx(share)


def test_queries_that_fit_the_budget_count_as_dense(llama: PreTrainedModel, ids: Ids) -> None:
    """A budget of 44 on 40 prompt tokens: the queries with 41..44 keys are dense, those with 45..51 sparse."""
    with enable(llama, profile_of(llama), FasaConfig(n_fac=44)) as fasa:
        generate(llama, ids(PROMPT, rows=1))
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 7, 7]


# Errors.


def test_a_prompt_longer_than_the_model_allows_is_refused(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, profile_of(llama), FasaConfig(n_fac=4)), torch.no_grad():
        llama(ids(512, rows=1))
        with raises_sentence(ValueError, match="512") as error:
            llama(ids(513, rows=1))
        assert "513" in str(error.value)
        with pytest.raises(ValueError, match="512"):
            generate(llama, ids(520, rows=1))


def test_nan_in_the_keys_of_a_prompt_is_refused(llama: PreTrainedModel, ids: Ids) -> None:
    profile = profile_of(llama)
    with enable(llama, profile, FasaConfig(n_fac=4)), torch.no_grad():
        llama.get_parameter("model.layers.1.self_attn.k_proj.weight")[3, 5] = torch.nan
        with raises_sentence(ValueError, match="NaN"):
            llama(ids(PROMPT, rows=1))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (FasaConfig(dense_layers=(3,)), "3"),
        (FasaConfig(dense_layers=(0, 17)), "17"),
        (FasaConfig(n_tip=9), "9"),
        (FasaConfig(backend="triton"), "needs a CUDA device, the layer is on cpu; use backend='auto'"),
    ],
    ids=["layer 3 of 3", "layer 17", "9 of 8 chunks", "kernels without a GPU"],
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    llama: PreTrainedModel, config: FasaConfig, named: str
) -> None:
    profile = profile_of(llama)
    with raises_sentence(ValueError, match=named):
        enable(llama, profile, config)
    assert llama.config._attn_implementation == "sdpa"


def test_a_model_without_rope_is_refused(gpt2: PreTrainedModel, llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="model type llama in the profile and gpt2 in the model; calibrate this model"):
        enable(gpt2, profile_of(llama))


def test_dropout_is_refused(make_model: Callable[..., PreTrainedModel], ids: Ids) -> None:
    model = make_model("Llama", attention_dropout=0.1).train()
    with (
        enable(model, profile_of(model), FasaConfig(n_fac=4, prefill="sparse", backend="gather")),
        pytest.raises(ValueError, match=r"call model\.eval\(\)"),
    ):
        model(ids(20, rows=1))
