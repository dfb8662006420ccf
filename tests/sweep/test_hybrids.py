"""Hybrids: their attention layers are sparse and decode as the oracle does, all other layers are as they were."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from cases import plain
from conftest import token_ids
from generation import close, generate, profile_of
from integration.test_oracle_decode import decoding_by_the_oracle
from sweep.build import build
from sweep.stated import STATED
from transformers import PreTrainedModel, StaticCache
from ways import PROMPT, prompts

from fasa_flex import FasaCache, FasaConfig, RotaryLayout, enable
from fasa_flex.hf.compatibility import cache_argument

HYBRIDS = {
    "Qwen3NextForCausalLM": (2, 3),
    "Qwen3_5ForCausalLM": (2, 3),
    "Lfm2ForCausalLM": (1, 3, 5, 7),
    "BambaForCausalLM": (1, 3),
    "FalconH1ForCausalLM": (0, 1, 2, 3),
    "GraniteMoeHybridForCausalLM": (1, 3),
    "MiniMaxForCausalLM": (0, 2),
    "JambaForCausalLM": (1, 3),
    "NemotronHForCausalLM": (2,),
    "KimiLinearForCausalLM": (3,),
    "ZambaForCausalLM": (2, 3),
    "Zamba2ForCausalLM": (2, 3),
    "ZayaForCausalLM": (0, 1, 2, 3),
}
"""Sparse layers of each."""

BESIDE_A_STATE = {"FalconH1ForCausalLM", "ZambaForCausalLM", "Zamba2ForCausalLM", "ZayaForCausalLM"}
"""Those whose cache layers hold a recurrent state, too."""


@dataclass
class Sparse:
    """What `decoding_by_the_oracle` reads of a family."""

    sparse: tuple[int, ...]
    pairs: list[list[int]]


def made(name: str) -> PreTrainedModel:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return build(name)


@pytest.mark.parametrize("config", [plain(n_fac=6, dense_layers=()), FasaConfig(n_fac=16, packed_dtype=None)])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_decodes_as_the_oracle(name: str, config: FasaConfig) -> None:
    """A step's state enters the next one, so that a fault of a recurrent layer would show from the second on."""
    model = made(name)
    profile = profile_of(model, mean_key=config.completion != "none")
    sparse = tuple(layer for layer in HYBRIDS[name] if layer not in config.dense_layers)
    prompt = token_ids(66, rows=1)
    with decoding_by_the_oracle(model, Sparse(sparse, profile.layout.chunks.tolist()), profile, config):
        expected_tokens, expected = generate(model, prompt, max_new_tokens=5)
    with enable(model, profile, config) as fasa:
        tokens, logits = generate(model, prompt, max_new_tokens=5)
        assert [layer for layer, stats in enumerate(fasa.stats.per_layer) if stats.sparse_queries] == list(sparse)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=5e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_are_found_behind_recurrent_layers(dtype: torch.dtype) -> None:
    """Their states depend on the position, so that the queries behind them would seem to turn in no plane."""
    for name, layout in (
        ("Qwen3_5ForCausalLM", RotaryLayout.half_split(16, 4)),
        ("Lfm2ForCausalLM", RotaryLayout.half_split(16)),
        ("ZayaForCausalLM", RotaryLayout.half_split(16, 8)),  # whose queries are convolved, too
    ):
        assert RotaryLayout.detect(made(name).to(dtype)) == layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("GraniteMoeHybridForCausalLM", {"position_embedding_type": "rope"}),
        ("Zamba2ForCausalLM", {"use_mem_rope": True}),
    ],
)
def test_a_hybrid_rotates_or_not_as_its_config_says(
    name: str, fields: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RotaryLayout.detect(made(name).to(dtype))
    assert (layout.n_rotated, layout.unrotated_layers) == (0, HYBRIDS[name])
    monkeypatch.setitem(STATED, name, {**STATED.get(name, {}), **fields})
    layout = RotaryLayout.detect(made(name).to(dtype))
    assert (layout.n_rotated, layout.unrotated_layers) == (len(layout.chunks), ())
    assert set(layout.unserved_layers).isdisjoint(HYBRIDS[name])


def test_windows_beside_recurrent_layers_are_said_to_be_windows() -> None:
    """Before transformers 5.24 its states lay outside of the cache, so that no plane is found behind them."""
    model = made("RecurrentGemmaForCausalLM")
    try:
        with enable(model, profile_of(model)) as fasa:
            assert "sliding window" in fasa.dense_layers[2]
    except NotImplementedError as error:
        assert "no layer that FASA can serve: layer 2 has a sliding window" in str(error)  # noqa: PT017 - one of two


@pytest.mark.parametrize("options", [{}, {"placement": "host"}, {"max_cache_len": 60}], ids=str)
@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "Lfm2ForCausalLM", "JambaForCausalLM", *sorted(BESIDE_A_STATE)])
def test_a_cache_of_a_hybrid_packs_its_attention_layers(name: str, options: dict[str, object]) -> None:
    if name in BESIDE_A_STATE and "placement" in options:
        return  # refused: test_keys_beside_a_state_are_not_moved_to_host_memory
    model = made(name)
    profile, config = profile_of(model), FasaConfig(n_fac=6, dense_layers=())
    with enable(model, profile, config):
        expected = generate(model, prompts())[1]
        cache = FasaCache(model, profile, config, **options)
        for _ in range(2):
            assert torch.equal(generate(model, prompts(), **cache_argument(model, cache))[1], expected)
            assert cache.size.device > 0
            cache.reset()
    assert [n for n, layer in enumerate(cache.layers) if hasattr(layer, "packed")] == list(HYBRIDS[name])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_with_keys_beside_a_state_are_the_eager_ones() -> None:
    model = made("FalconH1ForCausalLM")
    steps = []
    with torch.no_grad(), enable(model, profile_of(model), FasaConfig(n_fac=6, dense_layers=())) as fasa:
        for run in (model.forward, torch.compile(model.forward)):
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + 3)
            token = model(prompts(), **cache_argument(model, cache)).logits[:, -1:].argmax(-1)
            steps.append([run(token, **cache_argument(model, cache)).logits for _ in range(3)])
            assert all(hasattr(layer, "packed") for layer in cache.layers)
        assert fasa.stats.sparse_queries == 2 * 3 * len(prompts()) * 4
    close(torch.stack(steps[1]), torch.stack(steps[0]))


def test_keys_beside_a_state_are_not_moved_to_host_memory() -> None:
    model = made("FalconH1ForCausalLM")
    with pytest.raises(ValueError, match=r"finds no layer .*placement='device'"):
        FasaCache(model, profile_of(model), placement="host")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3_5ForCausalLM", "36 more were given.*layers 0 to 1 of the cache hold this forward"),
        ("FalconH1ForCausalLM", "36 more were given"),
    ],
)
def test_a_full_static_cache_of_a_hybrid_is_an_error_that_says_what_is_written(name: str, said: str) -> None:
    model = made(name)
    cache = cache_argument(model, StaticCache(config=model.config, max_cache_len=PROMPT + 14))
    with warnings.catch_warnings(), torch.no_grad(), enable(model, profile_of(model), FasaConfig(n_fac=6)):
        warnings.simplefilter("ignore")
        model(prompts(), **cache)
        with pytest.raises(ValueError, match=said):
            model(prompts(), **cache)
