"""Continuous batching by FASA's kernels, interpreted, and in graphs, recorded on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from batching import GREEDY, alone, batching, together
from generation import Ids, profile_of
from recorded import graphs_on_a_cpu, kernels_on_a_cpu
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.hf.continuous_batching import Pages
from fasa_flex.model.paged_forwards import Beside
from fasa_flex.paged.book import Plan

SMALL, NEW = FasaConfig(n_fac=16), 8
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's log(0) of masked lanes
    pytest.mark.slow,
]


@pytest.fixture
def profile(llama: PreTrainedModel) -> FasaProfile:
    return profile_of(llama, mean_key=True)


@contextmanager
def manager_of(
    model: PreTrainedModel, graphs: Any = (False, True), blocks: int = 6, cache: int = 60, **options: Any
) -> Iterator[Any]:
    """A manager whose decoding steps have tables of so many blocks a request, in graphs or not."""
    manager = model.init_continuous_batching(
        generation_config=GREEDY, continuous_batching_config=batching(blocks=cache, use_cuda_graph=graphs, **options)
    )
    manager.continuous_batching_config.max_blocks_per_request = blocks
    manager.continuous_batching_config.use_cuda_graph = graphs
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)


def answers(manager: Any, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    return collected(manager, [manager.add_request(prompt, max_new_tokens=new) for prompt in prompts])


def collected(manager: Any, names: list[str]) -> list[list[int]]:
    results: dict[str, list[int]] = {}
    while not set(names) <= set(results):
        result = manager.get_result(timeout=120)
        assert result is not None
        assert result.error is None
        if result.is_finished():
            results[result.request_id] = result.generated_tokens
    return [results[name] for name in names]


def test_the_kernels_answer_every_request_as_if_alone(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ids(length, seed=length).tolist() for length in (58, 17)]
    with enable(llama, profile, SMALL):
        expected = alone(llama, prompts, NEW)
        kernels_on_a_cpu(monkeypatch)
        assert together(llama, prompts, NEW) == expected


@pytest.mark.parametrize("dense_layers", [(0,), ()])
def test_a_graph_is_replayed_with_other_requests(
    llama: PreTrainedModel,
    profile: FasaProfile,
    ids: Ids,
    dense_layers: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second call replays graphs of the first, for requests of other lengths, in other slots and blocks."""
    first, second = ([ids(length, seed=length).tolist() for length in of] for of in ((58, 20), (33, 61)))
    with enable(llama, profile, FasaConfig(n_fac=16, dense_layers=dense_layers)) as fasa:
        expected = [alone(llama, prompts, NEW) for prompts in (first, second)]
        counts = fasa.stats.per_layer
        fasa.stats.reset()
        graphs = graphs_on_a_cpu(monkeypatch)
        with manager_of(llama) as manager:
            assert answers(manager, first) == expected[0]
            replayed = {graph: graph.replays for graph in graphs}
            assert answers(manager, second) == expected[1]
            assert any(graph.replays > replays for graph, replays in replayed.items())
            assert sum(graph.replays for graph in graphs) >= 2 * (NEW - 3)
            assert fasa.stats.per_layer == counts


def test_graphs_are_captured_again_for_more_requests(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of one request reads states that give way to larger ones when more requests come."""
    prompts = [ids(length, seed=length).tolist() for length in (40, 58, 20)]
    with enable(llama, profile, SMALL):
        expected = alone(llama, prompts, NEW)
        graphs = graphs_on_a_cpu(monkeypatch)
        with manager_of(llama) as manager:
            assert answers(manager, prompts[:1]) == expected[:1]
            made = len(graphs)
            assert answers(manager, prompts) == expected
            more = len(graphs)
            assert answers(manager, prompts[:1]) == expected[:1]
            assert len(graphs) == more + 1 > made + 1


def test_the_last_token_of_a_prompt_is_not_replayed(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork begins with it; it is dense, and a graph's tokens are sparse."""
    prompts = [ids(length, seed=length).tolist() for length in (20, 25, 70)]
    with enable(llama, profile, SMALL):
        expected = alone(llama, prompts, NEW)
        graphs = graphs_on_a_cpu(monkeypatch)
        with manager_of(llama, allow_block_sharing=False) as manager:
            assert answers(manager, prompts[:2]) == expected[:2]  # a graph for two requests
            made = len(graphs)
            manager.num_return_sequences = 2
            name = manager.add_request(prompts[2], max_new_tokens=NEW)
            assert collected(manager, [name, f"{name}__child#0"]) == [expected[2]] * 2
            assert len(graphs) == made


def test_a_replay_packs_what_came_back_from_the_host(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five blocks do not hold both answers: one request waits on the host, and goes on in other blocks."""
    empty, restored = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))  # pins without a GPU
    begin = Beside.begin

    def seen(self: Beside, pages: Pages, plan: Plan, slots: int) -> None:
        restored.append(plan.room is not None and plan.again is not None)
        begin(self, pages, plan, slots)

    monkeypatch.setattr(Beside, "begin", seen)
    prompts = [ids(length, seed=length).tolist() for length in (28, 25)]
    with enable(llama, profile, SMALL):
        expected = alone(llama, prompts, 12)
        graphs_on_a_cpu(monkeypatch)
        with manager_of(llama, blocks=3, cache=5, cpu_offload_space=0.01) as manager:
            assert answers(manager, prompts, 12) == expected
    assert any(restored)


def test_a_graph_is_not_replayed_after_disable(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is not compared: without FASA transformers reads tables of blocks by flash attention alone."""
    prompt = ids(60).tolist()
    graphs = graphs_on_a_cpu(monkeypatch)
    fasa = enable(llama, profile, FasaConfig(n_fac=16, dense_layers=()))
    with fasa, manager_of(llama) as manager:
        assert answers(manager, [prompt]) == alone(llama, [prompt], NEW)
        (graph,) = graphs
        replays = graph.replays
        fasa.disable()
        answers(manager, [prompt])
        assert len(graphs) == 2
        assert graph.replays == replays > 0


def error_of(model: PreTrainedModel, prompt: list[int], graphs: Any, blocks: int = 6) -> str:
    """The error of a request."""
    with manager_of(model, graphs, blocks) as manager:
        name = manager.add_request(prompt, max_new_tokens=4)
        result = manager.get_result(request_id=name, timeout=60)
    assert result is not None
    return str(result.error)


def test_a_graph_of_prompts_is_refused(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs_on_a_cpu(monkeypatch)
    with enable(llama, profile, SMALL):
        error = error_of(llama, ids(40).tolist(), (True, True))
    assert "pass ContinuousBatchingConfig(use_cuda_graph=(False, True))" in error


def test_a_graph_of_a_method_without_packed_keys_is_refused(
    llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs_on_a_cpu(monkeypatch)
    with enable(llama, None, SMALL, scorer=scorer_factory("oracle")):
        error = error_of(llama, ids(40).tolist(), (False, True))
    assert "needs packed keys in pages, which AllDimensions under backend='auto'" in error
