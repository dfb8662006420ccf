"""The words of the command line."""

from __future__ import annotations

import pytest

from fasa_flex.lm_eval.arguments import LayerSet, check_unknown, layer_set, sinks


@pytest.mark.parametrize(
    ("given", "layers"),
    [(0, (0,)), ("0+1", (0, 1)), ("3", (3,)), (None, ()), ("none", ()), ("2+0+2", (0, 2)), ([1, 2], (1, 2))],
)
def test_layer_sets(given: LayerSet, layers: tuple[int, ...]) -> None:
    assert layer_set(given) == layers


def test_streaming_llm_has_eight_sinks_or_half_the_budget() -> None:
    assert [sinks("streaming_llm", budget) for budget in (256, 16, 10, 0.1)] == [8, 8, 5, 8]
    assert sinks("fasa", 256) == 0


def test_arguments_of_from_pretrained_pass_unless_the_model_is_loaded() -> None:
    check_unknown(["attn_implementation", "device_map", "max_length"], ["n_fac", "dense_layers"], loads=True)
    with pytest.raises(ValueError, match="no argument 'attn_implementation': remove it"):
        check_unknown(["attn_implementation"], ["n_fac"], loads=False)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("pyramid", "pyramid"), ("2+1+0.5", (2.0, 1.0, 0.5)), ("2:1+1:1", ((2.0, 1.0), (1.0, 1.0))), ((1, 2), (1, 2))],
)
def test_layer_budgets(written: str, expected: object) -> None:
    assert layer_budgets(written) == expected


def test_layer_budgets_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="layer_budgets='steep' are no weights: write uniform, pyramid"):
        layer_budgets("steep")
