"""calibrate: equals the oracle's agreement on captured queries and keys, and leaves the world as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from sentences import raises_sentence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fasa_flex import FasaConfig, RotaryLayout, calibrate, enable

TOP_K, NEW = 8, 5


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Cohere"])
def test_equals_the_oracle_on_captured_queries_and_keys(
    name: str,
    make_model: Callable[..., PreTrainedModel],
    ids: Callable[..., Tensor],
    capture: Callable[..., list[tuple[Tensor, Tensor]]],
) -> None:
    model = make_model(name)
    samples = [ids(30, seed=1), ids(41, seed=2)]
    profile = calibrate(model, samples, top_k=TOP_K, max_new_tokens=NEW, progress=False)

    pairs = RotaryLayout.detect(model).chunks.tolist()
    tables = []
    for sample in samples:
        with torch.no_grad():
            whole = model.generate(
                sample[None], max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones(1, len(sample))
            )
        decoded = whole.shape[1] - len(sample)
        assert decoded == NEW
        tables.append(
            [
                oracle.contextual_agreement(q[:, :, -decoded:].double().numpy(), k.double().numpy(), pairs, TOP_K)
                for q, k in capture(model, whole)
            ]
        )
    expected = np.mean(tables, axis=0)

    assert profile.provenance.queries == 2 * NEW
    assert profile.agreement.shape == expected.shape
    difference = np.abs(profile.agreement.numpy() - expected)
    one_key = 1 / (TOP_K * 2 * NEW)  # float32 rounding may swap two nearly equal keys once; not more
    assert difference.max() <= 1.01 * one_key
    assert difference.mean() < 0.01 * one_key


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Llama", {}), ("Gemma 3", {"query_pre_attn_scalar": 100, "layer_types": ["full_attention"] * 3}), ("Cohere", {})],
)
def test_variance_covariance_and_mean_key_are_those_of_the_models_own_logits(
    name: str,
    changes: dict[str, Any],
    make_model: Callable[..., PreTrainedModel],
    ids: Callable[..., Tensor],
    capture: Callable[..., list[tuple[Tensor, Tensor]]],
) -> None:
    """The mean over all decoded queries of two samples of different lengths, chunk by chunk, in float64."""
    model = make_model(name, **changes)
    samples = [ids(30, seed=1), ids(41, seed=2)]
    profile = calibrate(model, samples, top_k=TOP_K, max_new_tokens=NEW, progress=False)
    assert profile.variance is not None
    assert profile.covariance is not None
    head_dim = profile.layout.head_dim
    scaling = 0.1 if changes else head_dim**-0.5
    covariance, mean_key = (
        torch.zeros(3, 4, *profile.covariance.shape[2:]).double(),
        torch.zeros(3, 4, head_dim).double(),
    )
    for sample in samples:
        with torch.no_grad():
            whole = model.generate(
                sample[None], max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones(1, len(sample))
            )
        for layer, (q, k) in enumerate(capture(model, whole)):
            for head in range(4):
                for number in range(1, NEW + 1):
                    query, keys = q[0, head, -number].double(), k[0, head // 2, : k.shape[2] - number + 1].double()
                    parts = [scaling * keys[:, chunk] @ query[chunk] for chunk in profile.layout.chunks]
                    covariance[layer, head] += torch.cov(torch.stack(parts), correction=0) / (2 * NEW)
                    mean_key[layer, head] += keys.mean(0) / (2 * NEW)
    variance, groups = covariance.diagonal(dim1=2, dim2=3), (3, 2, 2)
    torch.testing.assert_close(profile.variance.double(), variance, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        profile.covariance.double(), covariance.unflatten(1, groups[1:]).mean(2), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(profile.mean_key.double(), mean_key[:, ::2], rtol=1e-4, atol=1e-5)
    assert profile.variance.amax() > 2 * profile.variance.mean(), "the chunks hardly differ: the example is weak"


def test_chunks_of_another_layout_are_compared(
    llama: PreTrainedModel, ids: Callable[..., Tensor], capture: Callable[..., list[tuple[Tensor, Tensor]]]
) -> None:
    layout = RotaryLayout.interleaved(16)
    profile = calibrate(llama, [ids(30)], top_k=TOP_K, max_new_tokens=1, progress=False, layout=layout)
    assert profile.layout == layout
    with torch.no_grad():
        whole = llama.generate(ids(30)[None], max_new_tokens=1, do_sample=False, attention_mask=torch.ones(1, 30))
    query, key = (x.double().numpy() for x in capture(llama, whole)[1])
    expected = oracle.contextual_agreement(query[:, :, -1:], key, layout.chunks.tolist(), TOP_K)
    np.testing.assert_allclose(profile.agreement[1].numpy(), expected, atol=1e-6)


def test_table_shape_and_range(model: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    profile = calibrate(model, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    head_dim = RotaryLayout.detect(model).chunks.numel()
    assert profile.agreement.shape == (3, 4, head_dim // 2)
    assert profile.agreement.dtype == torch.float32
    assert 0 <= profile.agreement.min() < profile.agreement.max() <= 1
    assert torch.equal(profile.layout.chunks, RotaryLayout.half_split(head_dim).chunks)


def test_is_deterministic(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tables.append(calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False).agreement)
    assert torch.equal(*tables)


def test_ignores_sampling_settings_of_the_model(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    plain = calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    llama.generation_config.do_sample = True
    llama.generation_config.temperature = 5.0
    again = calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    assert torch.equal(plain.agreement, again.agreement)
    assert llama.generation_config.do_sample is True


def test_leaves_random_state_and_model_alone(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    prompt = ids(12, rows=2)
    with torch.no_grad():
        before = llama(prompt).logits
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert llama.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(llama(prompt).logits, before)


def test_texts_with_a_tokenizer_equal_their_token_ids(
    llama: PreTrainedModel, ids: Callable[..., Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = [ids(30, seed=3), ids(33, seed=4)]
    texts = [" ".join(f"w{token}" for token in sample.tolist()) for sample in samples]
    from_ids = calibrate(llama, samples, top_k=TOP_K, max_new_tokens=NEW, progress=False)
    from_texts = calibrate(llama, texts, top_k=TOP_K, max_new_tokens=NEW, progress=False, tokenizer=tokenizer)
    assert torch.equal(from_texts.agreement, from_ids.agreement)
    assert from_texts.provenance.sample_hashes == from_ids.provenance.sample_hashes


def test_progress_bar_goes_to_stderr_only_when_asked(
    llama: PreTrainedModel, ids: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=2, progress=False)
    assert capsys.readouterr() == ("", "")
    calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "1/1" in shown.err


def test_stops_at_the_end_of_sequence_token(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    sample = ids(32)
    with torch.no_grad():
        tokens = llama.generate(sample[None], max_new_tokens=NEW, do_sample=False)[0, 32:].tolist()
    last = next(i for i in range(1, NEW) if tokens[i] not in tokens[:i])
    llama.generation_config.eos_token_id = tokens[last]
    profile = calibrate(llama, [sample], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    assert 0 < profile.provenance.queries <= last + 1


@pytest.mark.parametrize(
    ("samples", "changes", "named"),
    [
        ([], {}, "(?i)sample"),
        ([[]], {}, "(?i)sample|token|empty"),
        ([[5] * 7], {}, "7"),  # fewer than top_k
        ([[5] * 510], {}, "512"),  # more than the model's maximum with the new tokens
        ([[5] * 32, [64] * 32], {}, "token ids 64..64, the model's vocabulary has 64"),
        ([[5] * 32], {"top_k": 0}, "top_k"),
        ([[5] * 32], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    llama: PreTrainedModel, samples: list[list[int]], changes: dict[str, int], named: str
) -> None:
    tensors = [torch.tensor(sample, dtype=torch.long) for sample in samples]
    settings = {"top_k": TOP_K, "max_new_tokens": NEW, **changes}
    with raises_sentence(ValueError, match=named):
        calibrate(llama, tensors, progress=False, **settings)


def test_texts_without_a_tokenizer_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="samples are texts but no tokenizer was given; pass tokenizer="):
        calibrate(llama, ["w3 w4 w5"], top_k=2, progress=False)


def test_a_model_without_rope_is_refused(gpt2: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^the queries of GPT2LMHeadModel depend .*; use a model with RoPE"):
        calibrate(gpt2, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)


def test_a_failed_calibration_gives_the_model_back(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="7"):
        calibrate(llama, [torch.full((7,), 5)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    assert llama.config._attn_implementation == "sdpa"


def test_an_enabled_model_is_refused(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    """Agreement is measured on dense attention."""
    profile = calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
    with (
        enable(llama, profile, FasaConfig(n_fac=4)),
        pytest.raises(ValueError, match=r"under FASA already, by .* Fasa\(.*n_fac=4.*\); disable\(\)"),
    ):
        calibrate(llama, [ids(32)], top_k=TOP_K, max_new_tokens=NEW, progress=False)
