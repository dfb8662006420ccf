"""RotaryLayout as a value: what it refuses, what equals what, what survives JSON; and frequencies read off a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentences import raises_sentence
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from fasa_flex import RotaryLayout
from fasa_flex.calibration import rotary
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.hf.probe import glance

PAIRS = torch.tensor([[0, 2], [1, 3], [4, 5]])


@pytest.mark.parametrize(
    ("chunks", "n_rotated", "named"),
    [
        (PAIRS.flatten(), 2, "exactly once"),
        (PAIRS[None], 2, "exactly once"),
        (torch.arange(6).view(1, 2, 3), 1, "exactly once"),
        (torch.tensor([[0], [1]]), 2, "exactly once"),
        (torch.arange(6).view(2, 3), 2, "exactly once"),
        (torch.tensor([[0, 1], [2, 2]]), 2, "exactly once"),
        (torch.tensor([[0, 1], [2, 4]]), 2, "exactly once"),
        (PAIRS + 1, 2, "exactly once"),
        (PAIRS, -1, "n_rotated must lie in 0..3, got -1"),
        (PAIRS, 4, "n_rotated must lie in 0..3, got 4"),
    ],
)
def test_what_is_no_layout_is_refused(chunks: torch.Tensor, n_rotated: int, named: str) -> None:
    with raises_sentence(ValueError, match=named):
        RotaryLayout(chunks, n_rotated)


@pytest.mark.parametrize("n_rotated", [0, 1, 2, 3])
def test_is_what_it_was_made_of(n_rotated: int) -> None:
    layout = RotaryLayout(PAIRS.int(), n_rotated)
    assert layout.chunks.dtype == torch.int64
    assert (layout.head_dim, layout.n_rotated, layout.frequencies, layout.unrotated_layers) == (6, n_rotated, None, ())


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "named"),
    [
        (0, None, "^head_dim must be even and at least 2, got 0"),
        (-2, None, "^head_dim must be even and at least 2, got -2"),
        (7, None, "^head_dim must be even and at least 2, got 7"),
        (1, None, "^head_dim must be even and at least 2, got 1"),
        (8, 0, r"^rotary_dim must be even and lie in 2\.\.8, got 0"),
        (8, -2, r"^rotary_dim must be even and lie in 2\.\.8, got -2"),
        (8, 3, r"^rotary_dim must be even and lie in 2\.\.8, got 3"),
        (2, 4, r"^rotary_dim must be even and lie in 2\.\.2, got 4"),
    ],
)
@pytest.mark.parametrize("make", [RotaryLayout.half_split, RotaryLayout.interleaved])
def test_sizes_out_of_range_are_refused(
    make: Callable[..., RotaryLayout], head_dim: int, rotary_dim: int | None, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        make(head_dim, rotary_dim)


def test_partial_layouts_say_how_much_turns() -> None:
    assert RotaryLayout.half_split(8, 4).n_rotated == RotaryLayout.interleaved(8, 4).n_rotated == 2
    assert RotaryLayout.half_split(8).n_rotated == 4


def test_equal_layouts_have_the_same_planes_and_as_many_that_turn() -> None:
    layout = RotaryLayout(PAIRS, 2)
    same = RotaryLayout(PAIRS.clone(), 2, torch.ones(2), (1,))
    assert layout == same
    assert hash(layout) == hash(same)
    for other in (
        RotaryLayout(PAIRS, 1),
        RotaryLayout(PAIRS, 3),
        RotaryLayout(PAIRS.flip(1), 2),
        RotaryLayout.half_split(8),
        "layout",
        None,
    ):
        assert layout != other
    assert len({layout, same, RotaryLayout(PAIRS, 3)}) == 2


@pytest.mark.parametrize("frequencies", [None, torch.tensor([1.0, 0.1], dtype=torch.float64)])
def test_survives_json(frequencies: torch.Tensor | None) -> None:
    layout = RotaryLayout(PAIRS, 2, frequencies, (0, 3), (1,))
    fields: dict[str, Any] = json.loads(json.dumps(layout.to_dict()))
    assert fields == {
        "chunks": [[0, 2], [1, 3], [4, 5]],
        "n_rotated": 2,
        "frequencies": None if frequencies is None else [1.0, 0.1],
        "unrotated_layers": [0, 3],
        "unserved_layers": [1],
    }
    loaded = RotaryLayout.from_dict(fields)
    assert loaded == layout
    assert (loaded.unrotated_layers, loaded.unserved_layers) == ((0, 3), (1,))
    assert loaded.chunks.dtype == torch.int64
    if frequencies is None:
        assert loaded.frequencies is None
    else:
        assert loaded.frequencies is not None
        assert loaded.frequencies.dtype == torch.float64
        assert loaded.frequencies.equal(frequencies)


def test_layers_without_rope_of_an_earlier_version_are_not_served() -> None:
    """Their profiles hold no measurements of these layers, and keep their fingerprints."""
    fields = RotaryLayout(PAIRS, 2, None, (0, 3), (0, 3)).to_dict()
    assert fields == RotaryLayout(PAIRS, 2).to_dict() | {"unrotated_layers": [0, 3]}
    assert RotaryLayout.from_dict(fields).unserved_layers == (0, 3)
    assert RotaryLayout.from_dict(RotaryLayout(PAIRS, 2).to_dict()).unserved_layers == ()


def test_shows_its_first_and_last_plane_that_turns() -> None:
    assert repr(RotaryLayout(PAIRS, 2)) == "RotaryLayout(head_dim=6, n_rotated=2, planes [0, 2] ... [1, 3])"


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("limit", [2, 9, 100, 512, 100_000])
def test_frequencies_are_those_of_the_model(
    make_model: Callable[..., PreTrainedModel], theta: float, limit: int
) -> None:
    """Resolved at the longest distance that the model allows, at most 1024; the slowest plane turns little in two."""
    rope = {"rope_type": "default", "rope_theta": theta}
    layout = RotaryLayout.detect(make_model("Llama", rope_parameters=rope, max_position_embeddings=limit))
    expected = theta ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert layout.frequencies is not None
    assert layout.frequencies.dtype == torch.float64
    relative = (layout.frequencies / expected - 1).abs().max()
    assert relative < (0.1 if limit < 100 else 1e-4)
    assert layout.unrotated_layers == ()


def test_layers_without_rope_are_found(make_model: Callable[..., PreTrainedModel]) -> None:
    layout = RotaryLayout.detect(make_model("SmolLM3 (layers without RoPE)"))
    assert (layout.unrotated_layers, layout.unserved_layers) == ((2,), ())
    assert layout == RotaryLayout.half_split(16)


def turned(pairs: list[list[int]], noise: float = 0.0, size: float = 1.0) -> torch.Tensor:
    """Queries [rows, P, D] that turn in these planes, as a probe would see them; ``noise`` is relative."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    out = start[:, None].repeat(1, len(POSITIONS), 1)
    for plane, (a, b) in enumerate(pairs):
        cos, sin = (POSITIONS * 0.3**plane).cos(), (POSITIONS * 0.3**plane).sin()
        out[..., a] = start[:, None, a] * cos - start[:, None, b] * sin
        out[..., b] = start[:, None, a] * sin + start[:, None, b] * cos
    spoiled = torch.randn(out.shape, generator=generator, dtype=torch.float64) * noise
    spoiled[:, 0] = 0
    return size * (out + spoiled)


POSITIONS = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
HALF, PAIRED = [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.fixture
def narrow(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model of heads of 8 dimensions, as many as `turned` has."""
    return make_model("Llama", head_dim=8)


def probe(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, *queries: torch.Tensor) -> None:
    """Let detection see these queries [rows, P, D] arrive, one tensor a layer."""
    _, heads, kv_heads, _ = attention_shape(model)
    arrivals = {}
    for layer, arrived in glance(model).items():
        if layer < len(queries):
            query = queries[layer].unflatten(0, (-1, heads))
            keys = torch.Size([len(query), kv_heads, *query.shape[2:]])
            arrivals[layer] = dataclasses.replace(arrived, query=query, key_shape=keys, value_shape=keys)
    monkeypatch.setattr(rotary, "_probe", lambda *_: (POSITIONS, arrivals))


def test_planes_and_frequencies_of_given_rotations(narrow: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for pairs in (HALF, PAIRED, [[0, 7], [1, 3]]):
        probe(monkeypatch, narrow, turned([]), turned(pairs), turned(pairs, size=1e-3))
        layout = RotaryLayout.detect(narrow)
        assert layout.chunks[: layout.n_rotated].tolist() == pairs
        assert layout.frequencies is not None
        torch.testing.assert_close(layout.frequencies, 0.3 ** torch.arange(len(pairs), dtype=torch.float64))
        assert (layout.unrotated_layers, layout.unserved_layers) == ((0,), ())


def test_queries_that_stand_still_in_every_layer_have_pairs_of_neighbours(
    narrow: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(monkeypatch, narrow, *[turned([])] * 3)
    layout = RotaryLayout.detect(narrow)
    assert layout.chunks.tolist() == PAIRED
    assert (layout.n_rotated, layout.unrotated_layers, layout.unserved_layers) == (0, (0, 1, 2), ())
    assert layout.frequencies is not None
    assert layout.frequencies.shape == (0,)
    assert RotaryLayout.from_dict(layout.to_dict()) == layout
    assert repr(layout) == "RotaryLayout(head_dim=8, n_rotated=0, pairs [0, 1] ... [6, 7])"


def test_a_layer_that_neither_stands_still_nor_rotates_is_not_served_among_others_that_do(
    narrow: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = turned([], noise=0.01)
    probe(monkeypatch, narrow, turned(HALF), moved, turned([]))
    layout = RotaryLayout.detect(narrow)
    assert (layout.unrotated_layers, layout.unserved_layers) == ((2,), (1,))
    probe(monkeypatch, narrow, turned([]), moved, turned([]))
    with pytest.raises(ValueError, match="depend on the position and do not rotate with it"):
        RotaryLayout.detect(narrow)


@pytest.mark.parametrize("order", [(HALF, PAIRED), (PAIRED, HALF)])
def test_layers_that_rotate_different_planes_are_refused(
    narrow: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, order: tuple[list[list[int]], ...]
) -> None:
    probe(monkeypatch, narrow, *map(turned, order))
    with pytest.raises(ValueError, match="rotate different planes"):
        RotaryLayout.detect(narrow)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_is_no_rotation_is_refused_whatever_its_size(
    narrow: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    probe(monkeypatch, narrow, turned(HALF, noise=0.02, size=size))
    with pytest.raises(ValueError, match="depend on the position and do not rotate with it"):
        RotaryLayout.detect(narrow)
    probe(monkeypatch, narrow, turned(HALF, noise=1e-5, size=size))
    assert RotaryLayout.detect(narrow).n_rotated == 4


def test_norms_that_scale_dimensions_apart_or_to_zero_hide_no_plane() -> None:
    """As in Gemma 3 270M, whose query norms scale some dimensions by 0.03, some by 8, and both of a plane to zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, vocab_size=40, num_hidden_layers=6, head_dim=32)).eval()
    plain = RotaryLayout.detect(model)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            scales = torch.logspace(-3, 1, 32)[torch.randperm(32)]
            scales[[number, number + 16, 15]] = 0.0
            layer.self_attn.q_norm.weight.copy_(scales - 1)
    found = RotaryLayout.detect(model)
    assert found == plain
    assert found.unrotated_layers == ()
    assert found.frequencies is not None
    assert plain.frequencies is not None
    torch.testing.assert_close(found.frequencies, plain.frequencies, rtol=1e-4, atol=0)
