"""Frequency chunks: every dimension once, dot products that add up, planes that RoPE turns, tables that survive."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import oracle
import torch
from families import tiny
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import HEAD_DIMS, cases, layouts

from fasa_flex import FasaProfile, RotaryLayout
from fasa_flex.calibration.provenance import Provenance

dims = st.integers(1, 128).map(lambda n: 2 * n)


@cases(0.5)
@given(dims, st.data())
def test_layouts_pair_every_dimension_once(head_dim: int, data: st.DataObject) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    for make in (RotaryLayout.half_split, RotaryLayout.interleaved):
        layout = make(head_dim, rotary_dim)
        assert layout.head_dim == head_dim
        assert layout.n_rotated == rotary_dim // 2
        assert sorted(layout.chunks.flatten().tolist()) == list(range(head_dim))
        assert sorted(layout.chunks[: rotary_dim // 2].flatten().tolist()) == list(range(rotary_dim))
        assert RotaryLayout.from_dict(layout.to_dict()) == layout


def turn(x: np.ndarray, pairs: list[list[int]], frequencies: np.ndarray, position: float) -> np.ndarray:
    """Rotary embedding as the paper writes it: plane i of x [D] turns by `position` times its frequency."""
    out = x.copy()
    for (a, b), frequency in zip(pairs, frequencies, strict=False):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


@cases(0.5)
@given(st.sampled_from(HEAD_DIMS), st.data())
def test_shifting_both_positions_leaves_every_chunk_and_their_sum_is_the_score(dim: int, data: st.DataObject) -> None:
    layout = data.draw(layouts(dim))
    rotated, half = 2 * layout.n_rotated, layout.n_rotated
    interleaved = layout.chunks[0].tolist() == [0, 1] and half > 1
    planes = [[2 * i, 2 * i + 1] if interleaved else [i, i + half] for i in range(half)]  # by hand
    frequencies = data.draw(st.sampled_from([1e2, 1e4, 5e5])) ** (-2 * np.arange(half) / rotated)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    q, k = generator.standard_normal(dim), generator.standard_normal(dim)
    at, to, shift = (data.draw(st.integers(0, 4000)) for _ in range(3))
    here = turn(q, planes, frequencies, at), turn(k, planes, frequencies, to)
    there = turn(q, planes, frequencies, at + shift), turn(k, planes, frequencies, to + shift)
    terms = [oracle.score(here[0], here[1][None], [pair])[0] for pair in layout.chunks.tolist()]
    for pair, term in zip(layout.chunks.tolist(), terms, strict=True):
        np.testing.assert_allclose(oracle.score(there[0], there[1][None], [pair])[0], term, atol=1e-9)
    np.testing.assert_allclose(sum(terms), here[0] @ here[1], atol=1e-9)


@cases(0.05)
@given(
    st.sampled_from(["Llama", "Cohere", "GLM", "StableLM"]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([1e3, 1e4, 1e6]),
    st.integers(0, 100),
)
def test_detect_finds_planes_and_frequencies(name: str, dim: int, share: float, theta: float, seed: int) -> None:
    """Read off random models, and right for any head size, rotated share and base."""
    partial = {"GLM": share, "StableLM": share}.get(name, 1.0)
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
    shape = {"head_dim": dim} if name in ("Llama", "GLM") else {"hidden_size": 4 * dim}
    layout = RotaryLayout.detect(tiny(name, seed=seed, num_hidden_layers=2, rope_parameters=rope, **shape))
    rotated = int(dim * partial)
    make = RotaryLayout.interleaved if name in ("Cohere", "GLM") else RotaryLayout.half_split
    assert layout.chunks.tolist() == make(dim, rotated).chunks.tolist()
    assert layout.n_rotated == rotated // 2
    assert layout.frequencies is not None
    expected = theta ** (-2 * np.arange(rotated // 2) / rotated)
    np.testing.assert_allclose(layout.frequencies.numpy(), expected, rtol=1e-3, atol=1e-7)
    assert layout.unrotated_layers == ()


@st.composite
def profiles(draw: st.DrawFn) -> FasaProfile:
    """Tables of any shape: counts of hits, where equal ones are common, or any numbers in [0, 1]."""
    dim, kv_heads, group = 2 * draw(st.integers(1, 16)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    chunks = torch.randperm(dim, generator=generator).view(-1, 2)
    n_rotated = draw(st.integers(1, dim // 2))
    frequencies = None
    if draw(st.booleans()):
        frequencies = torch.rand(n_rotated, generator=generator, dtype=torch.float64)
    unrotated = tuple(layer for layer in range(layers) if draw(st.booleans()))
    queries, top_k = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    shape = (layers, kv_heads * group, dim // 2)
    table = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        most = min(queries * top_k, draw(st.sampled_from([1, 6, 4096])))
        table = (torch.randint(0, most + 1, shape, generator=generator).double() / (queries * top_k)).float()
    words = st.text(max_size=12)
    return FasaProfile(
        table,
        RotaryLayout(chunks, n_rotated, frequencies, unrotated),
        Provenance(
            model_id=draw(words),
            model_type=draw(words),
            config_hash=draw(words),
            kv_heads=kv_heads,
            top_k=top_k,
            max_new_tokens=draw(st.integers(1, 64)),
            queries=queries,
            sample_hashes=tuple(draw(st.lists(words, max_size=3))),
            versions=draw(st.dictionaries(words, words, max_size=3)),
        ),
    )


@cases(0.5)
@given(profiles())
def test_profile_round_trip_is_exact(profile: FasaProfile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        profile.save_pretrained(folder)
        written = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        loaded = FasaProfile.from_pretrained(folder)
        loaded.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == written
    assert torch.equal(loaded.agreement, profile.agreement)
    assert loaded.layout == profile.layout
    assert loaded.layout.unrotated_layers == profile.layout.unrotated_layers
    ours, theirs = profile.layout.frequencies, loaded.layout.frequencies
    assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert dataclasses.asdict(loaded.provenance) == dataclasses.asdict(profile.provenance)
    assert loaded.fingerprint == profile.fingerprint


@cases(0.5)
@given(profiles(), st.data())
def test_dominant_chunks_equal_the_oracle(profile: FasaProfile, data: st.DataObject) -> None:
    n_tip = data.draw(st.integers(1, profile.agreement.shape[2]))
    for per, kv_heads in (("kv_head", profile.provenance.kv_heads), ("query_head", None)):
        chosen = profile.dominant(n_tip, per=per)
        pairs = profile.dominant_dims(n_tip, per=per)
        for layer, table in enumerate(profile.agreement.double().numpy()):
            expected = oracle.dominant(table, n_tip, kv_heads)
            assert chosen[layer].tolist() == expected.tolist()
            assert pairs[layer].tolist() == profile.layout.chunks.numpy()[expected].tolist()
