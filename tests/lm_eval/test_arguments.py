"""The words of the command line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from sentences import raises_sentence

from fasa_flex import FasaConfig
from fasa_flex.baselines import Method, as_published
from fasa_flex.lm_eval.arguments import (
    OPTIONS,
    LayerSet,
    budget_weights,
    check_batch_size,
    check_source,
    check_unknown,
    config_of,
    folder_or_profile,
    layer_set,
    own_names,
    path_as_written,
)
from fasa_flex.lm_eval.model import FasaHFLM

KNOWN = own_names(FasaHFLM)


@pytest.mark.parametrize(
    ("given", "layers"),
    [(0, (0,)), ("0+1", (0, 1)), ("3", (3,)), (None, ()), ("none", ()), ("2+0+2", (0, 2)), ([1, 2], (1, 2))],
)
def test_layer_sets(given: LayerSet, layers: tuple[int, ...]) -> None:
    assert layer_set(given) == layers


def test_streaming_llm_has_eight_sinks_or_half_the_budget() -> None:
    assert [as_published("streaming_llm", budget)["n_sink"] for budget in (256, 16, 10, 0.1)] == [8, 8, 5, 8]
    assert config_of("streaming_llm", n_fac=10).n_sink == 5
    assert config_of("streaming_llm", n_sink=None).n_sink == 8
    assert config_of("snapkv", n_fac=10).n_sink == 0
    assert config_of("fasa", n_fac=10).n_sink == FasaConfig().n_sink


def test_a_baseline_is_as_published_where_nothing_else_is_said() -> None:
    config = config_of("random_chunks", completion="mean")
    assert (config.n_tip, config.n_sink, config.n_recent, config.packed_dtype) == (0.25, 0, 0, None)
    assert (config.group_reduce, config.completion) == ("softmax_exact", "mean")
    sparq = config_of("sparq", n_fac=64)
    assert (sparq.completion, sparq.n_recent, sparq.n_sink) == ("mean", 16, 0)
    assert config_of("sparq", n_fac=64, completion=None, n_recent=3) == FasaConfig(
        0.25, 64, 0, 3, group_reduce="softmax_exact", packed_dtype=None, completion="none"
    )


def test_a_configuration_in_words() -> None:
    written = config_of("streaming_llm", n_fac=64, layer_budgets="1+2+1.5", dense_layers="0+2")
    plain: dict[str, Any] = {"n_recent": 0, "group_reduce": "softmax_exact", "packed_dtype": None, "completion": "none"}
    weights = (1.0, 2.0, 1.5)
    assert written == FasaConfig(0.25, 64, n_sink=8, layer_budgets=weights, dense_layers=(0, 2), **plain)
    pyramid = config_of("streaming_llm", n_fac=64, n_sink=1, layer_budgets="pyramid", dense_layers="none")
    assert pyramid == FasaConfig(0.25, 64, 1, layer_budgets="pyramid", dense_layers=(), **plain)


@pytest.mark.parametrize("method", get_args(Method))
def test_an_option_that_a_method_does_not_hear_is_refused_by_name(method: str) -> None:
    """Every baseline hears each of the three or refuses it; what lm-eval makes of ``none`` says nothing."""
    hears = {"sparq": ("n_tip",), "random_chunks": ("n_tip", "packed_dtype")}
    hears |= dict.fromkeys(("adjacent_pairs", "double_sparsity", "vattention"), ("n_tip", "packed_dtype"))
    for name, value in (("n_tip", 3), ("criterion", "agreement"), ("packed_dtype", "int8")):
        assert config_of(method, **{name: None}) == config_of(method)
        if name in hears.get(method, ()):
            assert getattr(config_of(method, **{name: value}), name) == value
        else:
            named = ", ".join(hears.get(method, ("none of them",)))
            expected = f"method={method} does not use {name}={value}.* uses {named}\\)\\.$"
            with raises_sentence(ValueError, match=expected):
                config_of(method, **{name: value})


@pytest.mark.parametrize(
    "option", [field.name for field in dataclasses.fields(FasaConfig) if field.name != "layer_budgets"]
)
@pytest.mark.parametrize("method", ["fasa", "streaming_llm"])
def test_none_on_the_command_line_is_none_in_a_string_of_arguments(method: str, option: str) -> None:
    assert config_of(method, **{option: "none"}) == config_of(method, **{option: None})


def test_every_field_of_the_configuration_is_an_option() -> None:
    """Whatever fields it has: those that are new, too."""
    names = {field.name for field in dataclasses.fields(FasaConfig)}
    assert names == set(OPTIONS) <= set(KNOWN)
    assert {"profile", "method", "sparse_tail"} <= set(KNOWN)
    assert not {"self", "options"} & set(KNOWN)
    for name in names:
        default = getattr(FasaConfig(), name)
        assert getattr(config_of("fasa", **{name: default}), name) in (default, "none")
    given = config_of("fasa", packed_dtype="int8", prefill="sparse", n_recent=4)
    assert (given.packed_dtype, given.prefill, given.n_recent) == ("int8", "sparse", 4)


def test_packed_keys_can_be_left_in_the_precision_of_the_cache() -> None:
    """lm-eval makes None of ``packed_dtype=none``."""
    assert config_of("fasa", packed_dtype=None).packed_dtype is None
    paper = {**FasaConfig.paper(n_fac=64).to_dict(), "dense_layers": "none"}
    assert config_of("fasa", **paper) == FasaConfig.paper(n_fac=64)


@pytest.mark.parametrize(
    ("given", "meant"), [(Path("a") / "b", "a/b"), (12, "12"), ("auto", "auto"), (None, None), ("a/b", "a/b")]
)
def test_a_profile_is_named_by_text_path_or_a_number(given: object, meant: str | None) -> None:
    """lm-eval makes an int of a folder named 12."""
    assert folder_or_profile(given) == meant


def test_a_path_of_digits_is_found_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval makes 12 of ``profile=012``; where 12 is there, too, nobody knows which was meant."""
    monkeypatch.chdir(tmp_path)
    assert folder_or_profile(12) == path_as_written("calibration_source", 12) == "12"
    Path("012").mkdir()
    Path("0123").mkdir()
    assert folder_or_profile(12) == path_as_written("profile_cache", 12) == "012"
    Path("12").mkdir()
    with raises_sentence(ValueError, match=r"^profile=12 may be any of 012, 12; write \./012 for the first of them\.$"):
        folder_or_profile(12)
    assert folder_or_profile("./12") == "./12"


@pytest.mark.parametrize("given", [True, 1.5, ["a"], {"a": 1}])
def test_what_is_no_profile_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=rf"^profile={re.escape(repr(given))} is no profile; pass its folder .*\.$"):
        folder_or_profile(given)


def test_a_text_for_a_calibration_that_does_not_take_place_is_refused() -> None:
    for profile, method in (("folder", "fasa"), ("prompt", "fasa"), (None, "streaming_llm")):
        with raises_sentence(ValueError, match=r"^calibration_source=/nope has no effect where nothing is calibrated"):
            check_source("/nope", profile, method)
        check_source(None, profile, method)
    for profile, method in (("auto", "fasa"), ("auto", "oracle"), ("folder", "double_sparsity")):
        check_source("/nope", profile, method)


def test_arguments_of_from_pretrained_pass_unless_the_model_is_loaded() -> None:
    check_unknown(["attn_implementation", "device_map", "max_length"], KNOWN, loads=True)
    for other, meant in (("budget", "n_fac"), ("chunks", "n_tip")):
        with pytest.raises(ValueError, match=f"no argument '{other}'; did you mean '{meant}'"):
            check_unknown([other], KNOWN, loads=True)
    with pytest.raises(ValueError, match=r"no argument 'attn_implementation'; remove it, or take one of .* n_fac, .*"):
        check_unknown(["attn_implementation"], KNOWN, loads=False)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("uniform", "uniform"),
        ("pyramid", "pyramid"),
        ("2+1+0.5", (2.0, 1.0, 0.5)),
        ("2 1", (2.0, 1.0)),
        ("2:1+1:1", ((2.0, 1.0), (1.0, 1.0))),
        ("2:1+3", ((2.0, 1.0), 3.0)),
        ((1, 2), (1, 2)),
    ],
)
def test_budget_weights(written: str, expected: object) -> None:
    assert budget_weights(written) == expected


@pytest.mark.parametrize("written", ["steep", "2+x", "2::1"])
def test_budget_weights_that_are_no_numbers(written: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"layer_budgets={written!r} are no weights; write uniform, pyramid")
    ):
        budget_weights(written)


def test_weights_that_are_not_positive_are_refused_by_the_configuration() -> None:
    with pytest.raises(ValueError, match="positive weights"):
        config_of("fasa", layer_budgets="1+0+2")


def test_none_is_a_way_to_rank_a_group() -> None:
    """lm-eval makes None of the word."""
    assert config_of("fasa", n_fac=64, group_reduce=None) == FasaConfig(n_fac=64, group_reduce="none")


@pytest.mark.parametrize("batch_size", [0, -1, "auto", "auto:4", "many"])
def test_batch_sizes_that_are_no_number_are_refused(batch_size: int | str) -> None:
    with raises_sentence(ValueError, match=f"batch_size={batch_size}"):
        check_batch_size(batch_size)


def test_what_would_be_dense_unnoticed_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='fastest' falls back to dense attention"):
        config_of("fasa", backend="fastest")
    with pytest.raises(ValueError, match=r"dense_layers=0\.1 is not a set of layers"):
        layer_set(0.1)  # type: ignore[arg-type]  # the mistake
