"""What is particular to a family: layers that stay dense and say so, models that are refused, and modes of running."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import transformers
from families import VOCABULARY, WINDOW, tiny
from generation import Ids, generate, profile_of
from sentences import raises_sentence
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from ways import PROMPT, prompts

from fasa_flex import FasaCache, FasaConfig, RotaryLayout, calibrate, enable
from fasa_flex.caches.packed_layers import PackedLayer

# Layers that stay dense.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", {0: "dense_layers"}),
        ("Gemma 2", {0: "dense_layers", 2: "sliding window"}),
        ("gpt-oss", {0: "dense_layers", 2: "sliding window"}),
        ("SmolLM3 (layers without RoPE)", {0: "dense_layers"}),
        ("Cohere2", {0: "dense_layers", 2: "sliding window"}),
    ],
)
def test_dense_layers_are_reported_with_their_reason(name: str, expected: dict[int, str]) -> None:
    model = tiny(name)
    with enable(model, profile_of(model), FasaConfig(n_fac=6)) as fasa:
        assert list(fasa.dense_layers) == list(expected)
        assert all(reason in fasa.dense_layers[layer] for layer, reason in expected.items())


def test_a_profile_of_an_earlier_version_leaves_layers_without_rope_dense() -> None:
    """It holds no measurements of them, and lists them with the layers that cannot be served."""
    model = tiny("SmolLM3 (layers without RoPE)")
    profile = profile_of(model)
    fields = profile.layout.to_dict()
    assert fields.pop("unserved_layers") == []
    profile.layout = RotaryLayout.from_dict(fields)
    for tables in (profile.agreement, profile.mean_key):
        tables[2] = 0
    with enable(model, profile, FasaConfig(n_fac=6)) as fasa:
        assert list(fasa.dense_layers) == [0, 2]
        assert "no measurement in the profile; calibrate again" in fasa.dense_layers[2]
    assert not isinstance(FasaCache(model, profile, FasaConfig(n_fac=6)).layers[2], PackedLayer)


def test_a_model_without_a_sparse_layer_warns() -> None:
    model = tiny("Mistral (sliding window)")
    with pytest.warns(UserWarning, match="nothing is sparse"):
        enable(model, profile_of(model), FasaConfig(n_fac=6)).disable()


def test_a_cache_packs_the_sparse_layers_only() -> None:
    model = tiny("SmolLM3 (layers without RoPE)")
    cache = FasaCache(model, profile_of(model), FasaConfig(n_fac=6))
    assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [False, True, True]


# Models that are refused.

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
REFUSED = {
    "Bloom": (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SIZES, n_head=4)), "ALiBi"),
    "MPT": (lambda: transformers.MptForCausalLM(transformers.MptConfig(vocab_size=64, d_model=64, n_heads=4)), "ALiBi"),
    "Falcon": (
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(**SIZES, num_attention_heads=4, alibi=True, new_decoder_architecture=False)
        ),
        "ALiBi",
    ),
    "T5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
        ),
        "encoder-decoder",
    ),
    "Mamba": (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES)), "layers of type|recurrent"),
    "GPT-2": (lambda: tiny("GPT2"), "no RoPE"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    "call",
    [
        RotaryLayout.detect,
        lambda model: calibrate(model, [torch.arange(20)], top_k=4, max_new_tokens=2, progress=False),
        lambda model: enable(model, profile_of(tiny("Llama"))),
    ],
    ids=["detect", "calibrate", "enable"],
)
def test_unsupported_models_are_refused_in_one_sentence(
    make: Callable[[], PreTrainedModel], reason: str, call: Callable[[PreTrainedModel], object]
) -> None:
    model = make().eval()
    with raises_sentence(ValueError, match=rf"{reason}|does not fit"):
        call(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("extra", [{"softcap": 20.0}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_an_implementation_that_leaves_the_models_softmax_out_is_refused(ids: Ids, extra: dict[str, object]) -> None:
    """sdpa has no logit cap and no sinks: dense prefill and sparse decode would not be one model."""
    model = tiny("Llama")
    with (
        enable(model, profile_of(model), FasaConfig(n_fac=6)),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"),
    ):
        model(ids(PROMPT, rows=1), **extra)


# Modes of running.


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"draft": "Llama"}], ids=["lookup", "draft"])
def test_speculative_decoding_gives_the_tokens_of_greedy_sparse_decoding(options: dict[str, object]) -> None:
    """A draft by the model itself is mostly accepted: forwards of several tokens, cropped after a refusal."""
    model, prompt = tiny("Llama"), prompts(rows=1)
    profile = profile_of(model)
    if options.pop("draft", None):
        options["assistant_model"] = tiny("Llama")
    run = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with enable(model, profile, FasaConfig(n_fac=6)) as fasa, fasa.sparse_from(torch.tensor([PROMPT])):
        greedy = model.generate(prompt, **run)
        fasa.stats.reset()
        assert model.generate(prompt, **run, **options).equal(greedy)
        assert fasa.stats.sparse_queries >= 2 * 11  # two sparse layers, eleven tokens fed, drafts refused besides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "GLM-4", "Gemma 2", "gpt-oss"])
def test_autocast_ranks_in_float32_and_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    model = tiny(name)
    profile, results = profile_of(model), []
    for backend in ("gather", "reference"):
        with enable(model, profile, FasaConfig(n_fac=6, backend=backend)) as fasa, torch.autocast("cpu", dtype=dtype):
            results.append(generate(model, prompts(), max_new_tokens=2)[1].float())  # one sparse step: no token differs
            assert fasa.stats.sparse_queries > 0
    torch.testing.assert_close(*results, atol=0.02 * float(results[0].abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_decode_as_the_reference(dtype: torch.dtype) -> None:
    model = tiny("Llama").to(dtype)
    profile, results = profile_of(model), []
    for backend in ("gather", "reference"):
        with enable(model, profile, FasaConfig(n_fac=6, backend=backend)):
            results.append(generate(model, prompts(), max_new_tokens=2)[1].float())
    torch.testing.assert_close(*results, atol=0.02 * float(results[0].abs().max()), rtol=0)


def test_inference_mode(ids: Ids) -> None:
    model = tiny("Llama")
    with enable(model, profile_of(model), FasaConfig(n_fac=6)):
        expected = generate(model, ids(PROMPT, rows=1))
        with torch.inference_mode():
            assert torch.equal(generate(model, ids(PROMPT, rows=1))[1], expected[1])


def test_gradients_flow_through_the_gather_and_the_reference_backend_alike(ids: Ids) -> None:
    grads: list[Tensor] = []
    for backend in ("gather", "reference"):
        model = tiny("Llama")
        with enable(model, profile_of(model), FasaConfig(n_fac=6, backend=backend, prefill="sparse")):
            model(ids(20, rows=1)).logits.square().mean().backward()
        grads.append(model.get_parameter("model.layers.1.self_attn.k_proj.weight").grad)
    torch.testing.assert_close(*grads, atol=1e-3 * float(grads[0].abs().max()), rtol=1e-3)


def test_gradients_are_refused_by_flex(ids: Ids) -> None:
    model = tiny("Llama")
    with (
        enable(model, profile_of(model), FasaConfig(n_fac=6, backend="flex", prefill="sparse")),
        pytest.raises(ValueError, match="no_grad"),
    ):
        model(ids(20, rows=1))


def test_two_threads_with_two_profiles_do_not_meet(ids: Ids) -> None:
    setups = [(tiny("Llama"), 4), (tiny("Qwen3"), 9)]
    profiles = [profile_of(model) for model, _ in setups]
    prompt = ids(PROMPT, rows=2)

    def run(number: int) -> tuple[Tensor, int]:
        model, n_fac = setups[number]
        with enable(model, profiles[number], FasaConfig(n_fac=n_fac, dense_layers=(number,))) as fasa:
            options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), fasa.stats.sparse_queries

    alone = [run(number) for number in range(2)]
    together: dict[int, list[tuple[Tensor, int]]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def thread(number: int) -> None:
        start.wait()
        for _ in range(4):
            together[number].append(run(number))

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(2)]
    for worker in threads:
        worker.start()
    for worker in threads:
        worker.join()
    for number, (tokens, count) in enumerate(alone):
        assert len(together[number]) == 4
        assert all(torch.equal(got, tokens) and sparse == count for got, sparse in together[number])


def test_a_static_buffer_longer_than_the_model_allows_is_no_long_sequence(ids: Ids) -> None:
    model = tiny("Llama", max_position_embeddings=64)
    cache = StaticCache(config=model.config, max_cache_len=128)
    with enable(model, profile_of(model), FasaConfig(n_fac=6)), torch.no_grad():
        model(ids(PROMPT, rows=1), past_key_values=cache)
        with pytest.raises(ValueError, match="64"):
            model(ids(64 - PROMPT + 1, rows=1), past_key_values=cache)


def test_the_windows_of_the_toy_models_are_shorter_than_their_prompts() -> None:
    assert WINDOW < PROMPT
