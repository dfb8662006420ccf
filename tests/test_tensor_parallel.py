"""A model that transformers shards by heads over two processes decodes, calibrates and counts as in one process."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import tiny, word_tokenizer
from generation import NEW, profile_of
from ranks import CASES, WORDS, Room, alone, in_two_processes
from torch import Tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

pytestmark = pytest.mark.slow
Results = dict[str, Any]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(folder / "Llama")
    (folder / WORDS).write_text(" ".join(f"w{3 + number * 7 % 61}" for number in range(200)))
    profile_of(tiny("Llama"), mean_key=True).save_pretrained(folder / "profile")
    models = {name: tiny(name) for name in ("Llama", "GPT-NeoX", "Phi-3 (long RoPE)")}
    models["GraniteSWA"] = tiny("GraniteSWA", layer_types=["full_attention"] * 3)
    models["one head"] = tiny("Llama", num_key_value_heads=1)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return Room(folder)


@pytest.fixture(scope="module")
def ranks(room: Room) -> list[Results]:
    return in_two_processes(room.folder)


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Equal, floats within rounding: sums over heads are added in another order."""
    assert type(found) is type(expected), f"{where}: {found}"
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, Tensor):
        assert found.equal(expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("learned_sinks", "evaluated")])
def test_two_processes_equal_one(name: str, room: Room, ranks: list[Results]) -> None:
    """Tokens, logits, log-likelihoods, profiles, and counts: of the whole model on every rank."""
    expected = CASES[name](room)
    for rank, results in enumerate(ranks):
        assert_same(results[name], expected, f"rank {rank}")


@pytest.mark.skipif("local_params" not in ALL_PARALLEL_STYLES, reason="transformers then shards no learned sinks")
def test_learned_sinks_are_those_of_the_heads(room: Room, ranks: list[Results]) -> None:
    for results in ranks:
        assert_same(results["learned_sinks"], CASES["learned_sinks"](room), "sinks")


def test_fasa_hf_evaluates_a_model_that_lm_eval_shards(room: Room, ranks: list[Results]) -> None:
    """One of the ranks keeps the profile, under the name that a run of one process gives it."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    if "tp_plan" not in inspect.signature(huggingface.HFLM.__init__).parameters:
        pytest.skip("lm-eval shards models since 0.4.12")
    expected = CASES["evaluated"](room)
    assert expected["cached"]
    for results in ranks:
        found = results["evaluated"]
        assert_same(torch.tensor(found.pop("scores")), torch.tensor(expected["scores"]), "scores")
        assert_same(found, {name: each for name, each in expected.items() if name != "scores"}, "answers")


def test_a_query_is_sparse_if_it_is_so_on_any_rank(ranks: list[Results]) -> None:
    """Rank 1 alone would count the padded row's queries as dense: its head's budget covers their keys."""
    for results in ranks:
        assert results["head_budgets"]["layers"][0].sparse_queries == 2 * (NEW - 1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("one_head", "LlamaForCausalLM has 1 key/value heads, which tp_size=2 cannot divide evenly"),
        ("queries_alone", "has 2 query heads on 2 key/value heads on a rank, where tp_size=2 leaves it 2 on 1"),
        ("by_layers", r"is divided by layers (pp_size=2)"),
    ],
)
def test_a_layout_that_cannot_be_sharded_is_refused(name: str, sentence: str, ranks: list[Results]) -> None:
    for results in ranks:
        kind, told = results[name].splitlines()[0].split(": ", 1)
        assert kind == "NotSupportedError"
        assert sentence in told
        assert told.count(". ") == 0
        assert told.endswith(".")


def test_fsdp2_keeps_working(room: Room, ranks: list[Results]) -> None:
    for results in ranks:
        for name, found in results["fsdp2"].items():
            assert_same(found, CASES[name](room), name)


def test_data_parallel_processes_are_each_on_their_own(room: Room, ranks: list[Results]) -> None:
    for rank, results in enumerate(ranks):
        assert_same(results["data_parallel"], alone(room.model(), room.prompt[rank : rank + 1]), f"rank {rank}")
