"""Continuous batching under FASA: every request is answered as if it were alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from batching import GREEDY, alone, batching, together
from families import tiny
from generation import Ids, profile_of
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.baselines import scorer_factory

LENGTHS = (40, 90, 17, 130)
SMALL = FasaConfig(n_fac=32)


def prompts_of(ids: Ids, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [ids(length, seed=seed).tolist() for seed, length in enumerate(lengths)]


@pytest.fixture
def profile(llama: PreTrainedModel) -> FasaProfile:
    return profile_of(llama, mean_key=True)


def test_a_budget_that_covers_all_keys_gives_the_dense_tokens(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids
) -> None:
    prompts = prompts_of(ids)
    dense = together(llama, prompts)
    assert dense == alone(llama, prompts)
    with enable(llama, profile, FasaConfig(n_fac=512)) as fasa:
        assert together(llama, prompts) == dense
        assert fasa.stats.sparse_queries == 0
        assert fasa.stats.dense_queries == 3 * (sum(LENGTHS) + 11 * len(LENGTHS))


CONFIGS = {
    "defaults": SMALL,
    "no completion": FasaConfig(n_fac=32, completion="none"),
    "mean value": FasaConfig(n_fac=24, completion="mean", packed_dtype="int8"),
    "packed in the cache's precision": FasaConfig(n_fac=32, packed_dtype=None, group_reduce="max", dense_layers=()),
    "the paper": FasaConfig.paper(n_fac=32),
    "a selection for each query head": FasaConfig(n_fac=32, group_reduce="none"),
    "a share": FasaConfig(n_fac=0.3),
    "budgets of heads": FasaConfig(n_fac=32, layer_budgets=(1, (2, 3), (1, 4))),
    "plain loops": FasaConfig(n_fac=16, backend="reference"),
    "a sparse prefill": FasaConfig(n_fac=32, prefill="sparse"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_request_is_answered_as_if_alone(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, config: FasaConfig
) -> None:
    """Tokens and counts; prompts are read in pieces of 64 tokens, beside requests that decode."""
    prompts = prompts_of(ids)
    with enable(llama, profile, config) as fasa:
        expected = alone(llama, prompts)
        counts = fasa.stats.per_layer
        assert fasa.stats.sparse_queries > 0
        fasa.stats.reset()
        assert together(llama, prompts) == expected
        assert fasa.stats.per_layer == counts


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "Gemma 3", "gpt-oss", "GLM-4"])
def test_families_with_windows_and_learned_sinks(ids: Ids, name: str, implementation: str) -> None:
    model, prompts = tiny(name), prompts_of(ids, (40, 70, 17))
    if implementation == "sdpa" and model.config.get_text_config()._attn_implementation == "eager":
        pytest.skip("its logits need eager attention")
    model.set_attn_implementation(implementation)
    dense = together(model, prompts)
    with enable(model, profile_of(model), FasaConfig(n_fac=512)):
        assert together(model, prompts) == dense
    with enable(model, profile_of(model), FasaConfig(n_fac=20, n_tip=4)) as fasa:
        expected = alone(model, prompts)
        fasa.stats.reset()
        assert together(model, prompts) == expected
        assert fasa.stats.sparse_queries > 0
    assert model.config.get_text_config()._attn_implementation == implementation


def test_requests_that_share_a_prefix(llama: PreTrainedModel, profile: FasaProfile, ids: Ids) -> None:
    """The second call finds blocks of the first in the cache, and with them their packed keys."""
    prefix = ids(70).tolist()
    prompts = [prefix + ids(length, seed=length).tolist() for length in (5, 20, 33)] + [prefix[:65], prefix]
    with enable(llama, profile, SMALL) as fasa:
        expected = alone(llama, prompts)
        with llama.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=batching()
        ) as manager:
            for _ in range(2):
                before = fasa.stats.dense_queries
                assert answers(manager, prompts) == expected
        assert fasa.stats.dense_queries - before < 3 * sum(map(len, prompts)) / 2  # most of the prompts was cached


def answers(manager: Any, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of every request, sent to a running manager."""
    names = [manager.add_request(prompt, max_new_tokens=12) for prompt in prompts]
    results = collect(manager, names)
    return [results[name] for name in names]


def collect(manager: Any, names: list[str]) -> dict[str, list[int]]:
    """New tokens of these requests, when all have finished."""
    results: dict[str, list[int]] = {}
    while not set(names) <= set(results):
        result = manager.get_result(timeout=30)
        assert result is not None
        assert result.error is None
        if result.is_finished():
            results[result.request_id] = result.generated_tokens
    return results


@pytest.mark.parametrize("sharing", [True, False])
def test_forks_copy_blocks(llama: PreTrainedModel, profile: FasaProfile, ids: Ids, sharing: bool) -> None:
    """A fork shares full blocks with its parent, or copies all; greedy forks go on alike."""
    prompts = prompts_of(ids, (40, 75))
    with (
        enable(llama, profile, SMALL),
        llama.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=batching(allow_block_sharing=sharing)
        ) as manager,
    ):
        manager.num_return_sequences = 3  # a generation config takes it for sampled tokens only
        names = [manager.add_request(prompt, max_new_tokens=12) for prompt in prompts]
        forks = [[name, f"{name}__child#0", f"{name}__child#1"] for name in names]
        results = collect(manager, [name for of_one in forks for name in of_one])
    for prompt, of_one in zip(prompts, forks, strict=True):
        with enable(llama, profile, SMALL):
            (expected,) = alone(llama, [prompt])
        assert [results[name] for name in of_one] == [expected] * 3


@pytest.mark.parametrize("swap", [0.0, 0.01])
def test_evicted_requests_go_on_as_before(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, swap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few blocks for all: some requests are offloaded, or their generated tokens are computed again."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))  # pins without a GPU
    prompts, evicted = prompts_of(ids, (60, 50, 70, 40, 55)), []
    offload = OffloadingManager.offload_requests

    def counted(self: OffloadingManager) -> Any:
        done = offload(self)
        evicted.append(sum(state.is_cpu_offloaded for state in self.scheduler.waiting_requests.values()))
        return done

    monkeypatch.setattr(OffloadingManager, "offload_requests", counted)
    with enable(llama, profile, FasaConfig(n_fac=24)):
        expected = alone(llama, prompts, new=40)
        assert together(llama, prompts, new=40, blocks=18, cpu_offload_space=swap) == expected
    assert evicted
    assert any(evicted) == bool(swap)


def test_a_cancelled_request_leaves_the_others_alone(llama: PreTrainedModel, profile: FasaProfile, ids: Ids) -> None:
    prompts = prompts_of(ids)
    with enable(llama, profile, SMALL):
        expected = alone(llama, prompts)
        with llama.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=batching()
        ) as manager:
            gone = manager.add_request(ids(50, seed=9).tolist(), max_new_tokens=400, streaming=True)
            assert manager.get_result(request_id=gone, timeout=30) is not None
            manager.cancel_request(gone)
            assert answers(manager, prompts) == expected


def test_a_model_without_a_profile_calibrates_on_the_first_long_prompt(llama: PreTrainedModel, ids: Ids) -> None:
    long, prompts = ids(150).tolist(), prompts_of(ids, (40, 90))
    with enable(llama, None, SMALL) as fasa:
        llama(torch.tensor([long]))
        expected, by_forward = alone(llama, prompts), fasa.profile
        fasa.recalibrate()
        dense = together(llama, prompts)
        assert fasa.profile is None
        together(llama, [long], tokens=256)
        assert fasa.profile is not None
        assert by_forward is not None
        torch.testing.assert_close(fasa.profile.variance, by_forward.variance)
        assert together(llama, prompts) == expected
    assert dense == together(llama, prompts)


def test_two_models_with_two_budgets_in_two_managers(ids: Ids) -> None:
    models, prompts = [tiny("Llama"), tiny("Qwen3")], prompts_of(ids)
    handles = [enable(m, profile_of(m), FasaConfig(n_fac=n)) for m, n in zip(models, (20, 48), strict=True)]
    expected = [alone(model, prompts) for model in models]
    managers = [
        model.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=batching())
        for model in models
    ]
    try:
        for manager in managers:
            manager.start()
        assert [answers(manager, prompts) for manager in managers] == expected
    finally:
        for manager in managers:
            manager.stop(block=True)
        for handle in handles:
            handle.disable()


@pytest.mark.parametrize("dense_layers", [(0,), ()])
def test_decoding_with_a_table_of_blocks(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, dense_layers: tuple[int, ...]
) -> None:
    """transformers makes the table for flash attention alone; a user may ask for it, as FASA reads it everywhere."""
    prompts = prompts_of(ids)
    with enable(llama, profile, FasaConfig(n_fac=32, dense_layers=dense_layers)) as fasa:
        expected = alone(llama, prompts)
        counts = fasa.stats.per_layer
        fasa.stats.reset()
        manager = llama.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=batching())
        manager.continuous_batching_config.max_blocks_per_request = 16
        manager.start()
        try:
            assert answers(manager, prompts) == expected
            assert manager.batch_processor is not None
            assert manager.batch_processor.inputs_and_outputs.use_block_table
        finally:
            manager.stop(block=True)
        assert fasa.stats.per_layer == counts


def pages_alive() -> int:
    from fasa_flex.paged.pages import PackedPages

    gc.collect()
    return sum(isinstance(each, PackedPages) for each in gc.get_objects())


def test_no_pages_stay_after_the_manager_or_after_disable(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids
) -> None:
    prompts = prompts_of(ids)
    dense = together(llama, prompts)
    with enable(llama, profile, SMALL):
        together(llama, prompts)
        assert pages_alive() == 0  # the manager and its cache are gone
        fasa_off = llama.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=batching())
        fasa_off.start()
        sparse = answers(fasa_off, prompts)
        assert pages_alive() == 2
    try:
        assert pages_alive() == 0
        assert sparse != dense
        assert answers(fasa_off, prompts) == dense  # the manager goes on with the model's own attention
    finally:
        fasa_off.stop(block=True)
    assert together(llama, prompts) == dense


def test_a_manager_that_runs_when_fasa_is_enabled(llama: PreTrainedModel, profile: FasaProfile, ids: Ids) -> None:
    """Keys that were cached before are packed when their request comes next.

    Before transformers 5.19 a manager sets a name that ends dense forwards, too; the model is refused as long.
    """
    prompt = ids(80).tolist()
    with enable(llama, profile, SMALL):
        (expected,) = alone(llama, [prompt])
    with llama.continuous_batching_context_manager(
        generation_config=GREEDY, continuous_batching_config=batching()
    ) as manager:
        (dense,) = answers(manager, [prompt])
        if llama.config._attn_implementation == "paged|sdpa":
            with pytest.raises(ValueError, match=r"implementation is 'paged\|sdpa'"):
                enable(llama, profile, SMALL)
            return
        with enable(llama, profile, SMALL) as fasa:
            assert answers(manager, [prompt]) == [expected]
            assert fasa.stats.sparse_queries == 2 * 11
            assert fasa.stats.dense_queries < 3 * 80
        assert answers(manager, [prompt]) == [dense]


def test_packed_pages_take_at_most_a_quarter_of_the_keys(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids
) -> None:
    with (
        enable(llama, profile, SMALL) as fasa,
        llama.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=batching()
        ) as manager,
    ):
        answers(manager, prompts_of(ids))
        heads, dim = llama.config.num_key_value_heads, llama.config.head_dim
        keys = 2 * 60 * 16 * heads * dim * 4  # two sparse layers in float32
        assert 0 < fasa.packed_bytes <= keys / 4


def test_methods_that_follow_sequences_are_refused(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, None, SMALL, scorer=scorer_factory("h2o")):
        results = llama.generate_batch(
            [ids(40).tolist()], generation_config=GREEDY, continuous_batching_config=batching(), progress_bar=False
        )
    (result,) = results.values()
    assert "follows one sequence" in str(result.error)


def test_a_prefill_by_blocks_is_refused(llama: PreTrainedModel, profile: FasaProfile, ids: Ids) -> None:
    with enable(llama, profile, FasaConfig(n_fac=32, prefill="blocks")):
        results = llama.generate_batch(
            [ids(40).tolist()], generation_config=GREEDY, continuous_batching_config=batching(), progress_bar=False
        )
    (result,) = results.values()
    assert "prefill='blocks' reads one prompt a row" in str(result.error)


def test_other_scorers_rank_the_keys_of_their_requests(llama: PreTrainedModel, ids: Ids) -> None:
    prompts = prompts_of(ids)
    with enable(llama, None, SMALL, scorer=scorer_factory("oracle")) as fasa:
        expected = alone(llama, prompts)
        assert together(llama, prompts) == expected
        assert fasa.stats.sparse_queries > 0
