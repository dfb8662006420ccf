"""The words of the command line."""

from __future__ import annotations

import re

import pytest

from fasa_flex import FasaConfig
from fasa_flex.lm_eval.arguments import (
    LayerSet,
    budget_weights,
    check_batch_size,
    check_unknown,
    config_of,
    layer_set,
    sinks,
)


@pytest.mark.parametrize(
    ("given", "layers"),
    [(0, (0,)), ("0+1", (0, 1)), ("3", (3,)), (None, ()), ("none", ()), ("2+0+2", (0, 2)), ([1, 2], (1, 2))],
)
def test_layer_sets(given: LayerSet, layers: tuple[int, ...]) -> None:
    assert layer_set(given) == layers


def test_streaming_llm_has_eight_sinks_or_half_the_budget() -> None:
    assert [sinks("streaming_llm", budget) for budget in (256, 16, 10, 0.1)] == [8, 8, 5, 8]
    assert sinks("fasa", 256) == sinks("snapkv", 256) == 0


def test_a_configuration_in_words() -> None:
    written = config_of("streaming_llm", 64, None, "1+2+1.5", "0+2", n_tip=3)
    assert written == FasaConfig(n_tip=3, n_fac=64, n_sink=8, layer_budgets=(1.0, 2.0, 1.5), dense_layers=(0, 2))
    assert config_of("streaming_llm", 64, 1, "pyramid", "none") == FasaConfig(
        n_fac=64, n_sink=1, layer_budgets="pyramid", dense_layers=()
    )


def test_arguments_of_from_pretrained_pass_unless_the_model_is_loaded() -> None:
    check_unknown(["attn_implementation", "device_map", "max_length"], ["n_fac", "dense_layers"], loads=True)
    with pytest.raises(ValueError, match="no argument 'attn_implementation': remove it"):
        check_unknown(["attn_implementation"], ["n_fac"], loads=False)


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
        ValueError, match=re.escape(f"layer_budgets={written!r} are no weights: write uniform, pyramid")
    ):
        budget_weights(written)


def test_weights_that_are_not_positive_are_refused_by_the_configuration() -> None:
    with pytest.raises(ValueError, match="positive weights"):
        config_of("fasa", 64, None, "1+0+2", 0)


def test_none_is_a_way_to_rank_a_group() -> None:
    """lm-eval makes None of the word."""
    assert config_of("fasa", 64, None, "uniform", 0, group_reduce=None) == FasaConfig(n_fac=64, group_reduce="none")


@pytest.mark.parametrize("batch_size", [0, -1, "auto", "auto:4", "many"])
def test_batch_sizes_that_are_no_number_are_refused(batch_size: int | str) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size}") as error:
        check_batch_size(batch_size)
    assert "\n" not in str(error.value)


def test_what_would_be_dense_unnoticed_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='fastest' is dense where that is faster"):
        config_of("fasa", 64, None, "uniform", 0, backend="fastest")
    with pytest.raises(ValueError, match=r"dense_layers=0\.1 is not a set of layers"):
        layer_set(0.1)  # type: ignore[arg-type]  # the mistake
