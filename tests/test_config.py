"""FasaConfig: every knob is checked once, and the message names the value."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from fasa_flex import FasaConfig, fasa_attention


def test_defaults_are_the_documented_ones() -> None:
    config = FasaConfig()
    assert (config.n_tip, config.n_fac, config.n_sink, config.n_recent) == (0.5, 256, None, None)
    assert (config.dense_layers, config.per, config.group_reduce) == ((0,), "kv_head", "softmax")
    assert (config.backend, config.prefill, config.criterion) == ("auto", "dense", None)
    assert (config.packed_dtype, config.completion, config.completion_strength) == ("int4", None, 0.75)


def test_the_papers_settings_are_written_out() -> None:
    """Wang et al. (2026): `head_dim // 8` chunks for every query head, by agreement; all layers, nothing else."""
    assert FasaConfig.paper() == FasaConfig(
        n_tip=0.25,
        n_fac=256,
        n_sink=0,
        n_recent=0,
        layer_budgets="uniform",
        dense_layers=(),
        per="query_head",
        criterion="agreement",
        group_reduce="softmax_exact",
        backend="auto",
        prefill="dense",
        packed_dtype=None,
        completion="none",
    )
    assert [FasaConfig.paper().chunks_of(dim) for dim in (16, 64, 128, 256)] == [2, 8, 16, 32]
    changed = FasaConfig.paper(n_fac=64, per="kv_head")
    assert (changed.n_fac, changed.per, changed.completion) == (64, "kv_head", "none")
    with pytest.raises(ValueError, match="n_fac"):
        FasaConfig.paper(n_fac=0)


@pytest.mark.parametrize(
    ("n_tip", "head_dim", "chunks"),
    [(0.5, 128, 32), (0.5, 80, 20), (0.25, 64, 8), (1.0, 16, 8), (1e-9, 16, 1), (5, 16, 5)],
)
def test_a_share_of_chunks_is_a_count_of_them(n_tip: float, head_dim: int, chunks: int) -> None:
    assert FasaConfig(n_tip=n_tip).chunks_of(head_dim) == chunks


def test_a_config_is_frozen_and_compares_by_value() -> None:
    config = FasaConfig(n_fac=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_fac = 32
    assert config == FasaConfig(n_fac=64)
    assert config != FasaConfig(n_fac=65)
    assert hash(config) == hash(FasaConfig(n_fac=64))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_fac": 1},
        {"n_fac": 1.0},
        {"n_fac": 1e-6},
        {"n_tip": 1},
        {"n_tip": 1.0},
        {"n_fac": 8, "n_sink": 4, "n_recent": 4},
        {"dense_layers": ()},
        {"dense_layers": (0, 5)},
        {"group_reduce": "none", "per": "query_head"},
        {"group_reduce": "softmax", "backend": "reference"},
        {"prefill": "sparse"},
        {"n_sink": None, "n_recent": None, "n_fac": 1},
        {"n_sink": None, "n_recent": 8, "n_fac": 9},
        {"completion": "mean", "completion_strength": 0.0},
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(fields: dict[str, object]) -> None:
    config = FasaConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_tip", 0),
        ("n_tip", -3),
        ("n_tip", 1.5),
        ("n_tip", 0.0),
        ("n_tip", float("nan")),
        ("n_fac", 0),
        ("n_fac", -256),
        ("n_fac", 0.0),
        ("n_fac", -0.25),
        ("n_fac", 1.25),
        ("n_fac", float("nan")),
        ("n_fac", float("inf")),
        ("n_fac", "256"),
        ("n_fac", None),
        ("n_fac", True),
        ("n_sink", -1),
        ("n_sink", 0.5),
        ("n_recent", -2),
        ("n_recent", "4"),
        ("dense_layers", 0),
        ("dense_layers", (-1,)),
        ("dense_layers", (0.5,)),
        ("dense_layers", "0"),
        ("per", "head"),
        ("per", None),
        ("group_reduce", "median"),
        ("criterion", "entropy"),
        ("packed_dtype", "int2"),
        ("completion", "second_order"),
        ("completion_strength", float("inf")),
        ("completion_strength", "half"),
        ("backend", "sdpa"),
        ("prefill", "half"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_in_one_sentence_that_names_it(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        FasaConfig(**{name: value})
    message = str(error.value)
    assert name in message
    shown = value[0] if isinstance(value, tuple) else value
    assert str(shown) in message
    assert "\n" not in message
    assert len(re.findall(r"[.!?](?:\s|$)", message)) == 1, f"not one sentence: {message!r}"


@pytest.mark.parametrize("name", ["n_fac", "n_sink", "per", "backend"])
def test_out_of_range_is_a_value_error(name: str) -> None:
    bad = {"n_fac": 0, "n_sink": -1, "per": "head", "backend": "sdpa"}
    with pytest.raises(ValueError, match=name):
        FasaConfig(**{name: bad[name]})


@pytest.mark.parametrize(("n_sink", "n_recent"), [(9, 0), (0, 9), (4, 5), (8, 8)])
def test_forced_tokens_must_fit_in_the_budget(n_sink: int, n_recent: int) -> None:
    with pytest.raises(ValueError, match="n_sink") as error:
        FasaConfig(n_fac=8, n_sink=n_sink, n_recent=n_recent)
    message = str(error.value)
    assert "n_recent" in message
    assert "8" in message


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="n_face"):
        FasaConfig(n_face=1)


@pytest.mark.parametrize("n_fac", [(20,), (20, 10), [20, 10], (0.5,), "20"])
def test_a_budget_is_one_number_for_a_config_and_for_a_call(n_fac: Any) -> None:
    q, k, chunks = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 30, 16), torch.tensor([[[0, 8]], [[0, 8]]])
    for stated in (lambda: FasaConfig(n_fac=n_fac), lambda: fasa_attention(q, k, k, chunks, n_fac=n_fac)):
        with pytest.raises(ValueError, match=f"n_fac must be one number, got {re.escape(repr(n_fac))}"):
            stated()
