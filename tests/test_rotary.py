"""RotaryLayout: the planes named, the planes detected, and the property that makes a plane a plane."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import Family
from sentences import raises_sentence
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import RotaryLayout

Capture = Callable[..., list[tuple[Tensor, Tensor]]]


@pytest.mark.parametrize(
    ("layout", "pairs"),
    [
        (RotaryLayout.half_split(8), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (RotaryLayout.interleaved(8), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (RotaryLayout.half_split(8, 4), [[0, 2], [1, 3], [4, 5], [6, 7]]),
        (RotaryLayout.interleaved(8, 4), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (RotaryLayout.half_split(8, rotary_dim=2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (RotaryLayout.half_split(2), [[0, 1]]),
    ],
    ids=["half", "interleaved", "half, partial", "interleaved, partial", "half, one plane", "smallest"],
)
def test_named_layouts_written_out(layout: RotaryLayout, pairs: list[list[int]]) -> None:
    assert layout.chunks.dtype == torch.long
    assert layout.chunks.tolist() == pairs


@pytest.mark.parametrize("make", [RotaryLayout.half_split, RotaryLayout.interleaved])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, None), (64, 64), (64, 32), (128, 2), (80, 32)])
def test_every_dimension_is_in_exactly_one_chunk(
    make: Callable[[int, int | None], RotaryLayout], head_dim: int, rotary_dim: int | None
) -> None:
    chunks = make(head_dim, rotary_dim).chunks
    assert chunks.shape == (head_dim // 2, 2)
    assert sorted(chunks.flatten().tolist()) == list(range(head_dim))
    rotated = chunks[: (rotary_dim or head_dim) // 2]
    assert sorted(rotated.flatten().tolist()) == list(range(rotary_dim or head_dim))  # unrotated pairs come behind


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "named"), [(7, None, "7"), (0, None, "0"), (8, 3, "3"), (8, 10, "10"), (8, 0, "0")]
)
@pytest.mark.parametrize("make", [RotaryLayout.half_split, RotaryLayout.interleaved])
def test_impossible_sizes_are_refused(
    make: Callable[[int, int | None], RotaryLayout], head_dim: int, rotary_dim: int | None, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        make(head_dim, rotary_dim)


def test_detect_finds_the_layout_of_every_family(family: Family, make_model: Callable[..., PreTrainedModel]) -> None:
    detected = RotaryLayout.detect(make_model(family.name))
    assert detected.chunks.dtype == torch.long
    assert detected.chunks.tolist() == family.pairs


def test_detect_in_half_precision_sees_the_layout_and_the_layers_of_the_model_itself(
    family: Family, make_model: Callable[..., PreTrainedModel]
) -> None:
    """The planes come from a small float32 twin, which a model of more layers does not fit in."""
    model = make_model(family.name)
    exact, state = RotaryLayout.detect(model), torch.get_rng_state()
    detected = RotaryLayout.detect(model.to(torch.bfloat16))
    assert detected.chunks.tolist() == family.pairs
    assert detected.unrotated_layers == exact.unrotated_layers
    assert detected.unserved_layers == exact.unserved_layers
    assert torch.equal(torch.get_rng_state(), state)


def test_detect_in_half_precision_finds_a_layer_without_rope_beyond_the_twin(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    layers = [1] * 10 + [0, 1]
    model = make_model("SmolLM3 (layers without RoPE)", num_hidden_layers=12, no_rope_layers=layers)
    assert RotaryLayout.detect(model.to(torch.bfloat16)).unrotated_layers == (10,)


def test_detect_leaves_the_model_and_the_random_state_alone(llama: PreTrainedModel, ids: Callable[..., Tensor]) -> None:
    prompt = ids(12, rows=2)
    with torch.no_grad():
        before = llama(prompt).logits
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    implementation, state, training = llama.config._attn_implementation, torch.get_rng_state(), llama.training

    RotaryLayout.detect(llama)

    assert llama.config._attn_implementation == implementation
    assert llama.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in llama.state_dict().items())
    with torch.no_grad():
        assert torch.equal(llama(prompt).logits, before)


def test_detect_works_in_training_mode_and_returns_there(llama: PreTrainedModel) -> None:
    llama.train()
    assert RotaryLayout.detect(llama).chunks.tolist() == RotaryLayout.half_split(16).chunks.tolist()
    assert llama.training


def test_detect_refuses_a_model_without_rope(gpt2: PreTrainedModel) -> None:
    with raises_sentence(ValueError, match=r"^the queries of GPT2LMHeadModel depend .*\(no RoPE, .*; use a model"):
        RotaryLayout.detect(gpt2)


def shift_change(model: PreTrainedModel, capture: Capture, pairs: Tensor, ids: Tensor, shift: int) -> Tensor:
    """Largest change of each pair's q . k, over layers, heads and positions, when every position moves by `shift`.

    Relative to the typical size of the term; -> [chunks].
    """
    positions = torch.arange(ids.shape[1])[None]
    changes = []
    here, there = capture(model, ids, positions), capture(model, ids, positions + shift)
    for (q0, k0), (q1, k1) in zip(here, there, strict=True):
        group = q0.shape[1] // k0.shape[1]

        def terms(q: Tensor, k: Tensor, group: int = group) -> Tensor:
            k = k.double().repeat_interleave(group, 1)
            return torch.einsum("bhqcp,bhkcp->cbhqk", q.double()[..., pairs], k[..., pairs]).flatten(1)

        before, after = terms(q0, k0), terms(q1, k1)
        changes.append((after - before).abs().amax(1) / before.std())
    return torch.stack(changes).amax(0)


@pytest.mark.parametrize("name", ["Llama", "Cohere", "GLM", "StableLM", "DeepSeek-V2 (MLA)", "DeepSeek-V3 (MLA)"])
@pytest.mark.parametrize("shift", [1, 37])
def test_shifting_all_positions_leaves_every_chunk_unchanged(
    name: str, shift: int, make_model: Callable[..., PreTrainedModel], capture: Capture, ids: Callable[..., Tensor]
) -> None:
    model = make_model(name)
    pairs = RotaryLayout.detect(model).chunks
    assert shift_change(model, capture, pairs, ids(24, rows=1), shift).max() < 1e-3


def test_the_shift_test_fails_for_the_pairing_of_the_released_code(
    llama: PreTrainedModel, capture: Capture, ids: Callable[..., Tensor]
) -> None:
    """(2i, 2i + 1) on a half-split model: almost every such pair changes, so the test above can fail."""
    wrong = torch.arange(16).view(8, 2)
    change = shift_change(llama, capture, wrong, ids(24, rows=1), 37)
    assert (change > 0.1).sum() >= 6, change
