"""The seam: every config keeps its own implementation, and a handle serves its own model alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers
from families import tiny
from generation import Ids, profile_of
from sentences import raises_sentence
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from fasa_flex import FasaConfig, calibrate, enable

CONFIG = FasaConfig(n_fac=6, n_tip=2, dense_layers=())
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def paligemma(text: str = "gemma2") -> PreTrainedModel:
    """A text model that needs eager attention beside a vision tower with sdpa, which is transformers' own default."""
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        text_config=dict(TEXT, model_type=text, head_dim=16),
        vision_config=dict(VISION, model_type="siglip_vision_model"),
        projection_dim=64,
        image_token_index=60,
    )
    model: PreTrainedModel = transformers.PaliGemmaForConditionalGeneration(config).eval()
    return model


def implementations(model: PreTrainedModel) -> list[str]:
    config = model.config
    return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]


@torch.no_grad()
def test_every_submodel_keeps_its_own_implementation(ids: Ids) -> None:
    model, prompt = paligemma(), ids(40, rows=1)
    dense, former = model(prompt).logits, implementations(model)
    assert former[::2] == ["sdpa", "sdpa"]  # the text model has eager, in transformers 5.17 sdpa
    profile = calibrate(model, [prompt[0]], top_k=8, max_new_tokens=2, progress=False)
    assert implementations(model) == former
    with enable(model, profile, CONFIG) as fasa:
        model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 3, 0]  # Gemma 2's others have a window
        assert implementations(model)[::2] == ["sdpa", "sdpa"]
    assert implementations(model) == former
    assert torch.equal(model(prompt).logits, dense)


@torch.no_grad()
def test_a_model_that_shares_the_config_stays_dense_and_may_be_enabled_by_itself(ids: Ids) -> None:
    first, prompt = tiny("Llama"), ids(40, rows=1)
    torch.manual_seed(1)
    second = transformers.LlamaForCausalLM(first.config).eval()
    profiles, dense = [profile_of(model) for model in (first, second)], second(prompt).logits
    handle = enable(first, profiles[0], CONFIG)
    assert torch.equal(second(prompt).logits, dense)
    assert handle.stats.dense_queries == 0
    other = enable(second, profiles[1], CONFIG)
    handle.disable()  # the config is still needed
    second.generate(prompt, max_new_tokens=4, do_sample=False)
    assert other.stats.sparse_queries == 3 * 3
    other.disable()
    assert first.config._attn_implementation == "sdpa"
    assert torch.equal(second(prompt).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_built_from_a_copied_config_outlives_the_handle(ids: Ids, implementation: str) -> None:
    model, prompt = tiny("Llama"), ids(40, rows=1)
    model.set_attn_implementation(implementation)
    with enable(model, profile_of(model), CONFIG) as fasa:
        built = transformers.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
        inside = built(prompt).logits
        assert fasa.stats.dense_queries == 0
    assert torch.equal(built(prompt).logits, inside)
    built.set_attn_implementation(implementation)
    assert torch.equal(built(prompt).logits, inside)


def test_the_refusal_to_enable_twice_names_the_handle_and_what_to_do(llama: PreTrainedModel) -> None:
    profile = profile_of(llama)
    with enable(llama, profile, CONFIG):
        for again in (lambda: enable(llama, profile, CONFIG), lambda: enable(llama.model, profile, CONFIG)):
            with pytest.raises(
                ValueError, match=r"under FASA already.*Fasa\(LlamaForCausalLM, n_fac=6.*\).*disable\(\)"
            ):
                again()
        with pytest.raises(ValueError, match=r"under FASA already.*disable\(\)"):
            profile_of(llama)
    with enable(llama, profile, CONFIG):
        pass


@torch.no_grad()
def test_another_implementation_set_while_enabled_is_noticed_and_kept(llama: PreTrainedModel, ids: Ids) -> None:
    profile = profile_of(llama)
    fasa = enable(llama, profile, CONFIG)
    llama.set_attn_implementation("eager")
    with raises_sentence(ValueError, match=r"set to 'eager'.*disable\(\)"):
        llama(ids(20, rows=1))
    fasa.disable()
    assert llama.config._attn_implementation == "eager"
    with enable(llama, profile, CONFIG) as again:
        llama.generate(ids(40, rows=1), max_new_tokens=2, do_sample=False)
        assert again.stats.sparse_queries == 3
    assert llama.config._attn_implementation == "eager"


def test_a_handle_that_was_disabled_is_not_entered_again(llama: PreTrainedModel) -> None:
    fasa = enable(llama, profile_of(llama), CONFIG)
    fasa.disable()
    for use in (fasa.__enter__, fasa.sparse_from(torch.tensor([3])).__enter__):
        with pytest.raises(ValueError, match=r"was disabled.*enable"):
            use()


@pytest.mark.parametrize("take", [pickle.dumps, copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copied handle"])
def test_an_enabled_model_is_neither_pickled_nor_copied(llama: PreTrainedModel, take: Callable[..., object]) -> None:
    with enable(llama, profile_of(llama), CONFIG) as fasa, raises_sentence(ValueError, match=r"disable\(\)"):
        take(fasa if take is copy.copy else llama)
    take(llama)


def test_the_models_own_config_is_not_changed_and_its_modules_get_it_back() -> None:
    """Masks, continuous batching and other models read this config."""
    model = tiny("Llama")
    config, modules = model.config, [layer.self_attn for layer in model.model.layers]
    with enable(model, profile_of(model), CONFIG):
        assert config._attn_implementation == "sdpa"
        assert {module.config._attn_implementation for module in modules} == {"fasa_sdpa"}
        assert len({id(module.config) for module in modules}) == 1
    assert all(module.config is config for module in modules)
    assert not any("fasa" in name for module in modules for name in vars(module))


class OwnAttention(LlamaAttention):
    """A user's subclass, in a module without an attention function of its own."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("kind", [OwnAttention, type("InNoModule", (LlamaAttention,), {"__module__": "nowhere"})])
def test_a_subclass_of_an_attention_class_in_eager(ids: Ids, kind: type[nn.Module]) -> None:
    model, prompt = tiny("Llama"), ids(40, rows=1)
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    model.set_attn_implementation("eager")
    dense = model(prompt).logits
    with enable(model, profile_of(model), FasaConfig(n_fac=64, n_tip=2)):
        assert torch.equal(model(prompt).logits, dense)
