"""A `generate` that names no cache: where it takes a static one, what that costs at first, and how to have the other.

A CPU stands for the GPU. An answer of one token decodes nothing, so it chooses a cache and compiles none.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from generation import Ids, profile_of
from sweep.build import build
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.model import decode_cache

CONFIG = FasaConfig(n_fac=5, n_tip=2)
PROMPT = 140
Chosen = list[int | None]
"""Slots of the static cache of each answer; None: the cache grew."""


@pytest.fixture
def profile(llama: PreTrainedModel) -> FasaProfile:
    return profile_of(llama)


@pytest.fixture
def chosen(llama: PreTrainedModel, profile: FasaProfile, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Caches that `llama` read its prompts into, on a CPU that waits for Python and has a gigabyte free."""
    monkeypatch.setattr(decode_cache, "WAITING", "cpu")
    monkeypatch.setattr(decode_cache, "BREAK_EVEN", 1)
    monkeypatch.setattr(decode_cache, "free_bytes", lambda device: 1 << 30)
    seen: Chosen = []

    def note(module: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        cache = next((kwargs[name] for name in decode_cache.CACHE_NAMES if kwargs.get(name) is not None), None)
        if (args[0] if args else kwargs["input_ids"]).shape[1] > 1:
            seen.append(cache.layers[0].max_cache_len if isinstance(cache, StaticCache) else None)

    llama.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def plain(model: PreTrainedModel, prompt: torch.Tensor, tokens: int = 1, **options: Any) -> torch.Tensor:
    """The call as everybody writes it, but for the leave to compile on a CPU, without which transformers never does."""
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    greedy = {"do_sample": False, "max_new_tokens": tokens, "compile_config": compiled}
    out: torch.Tensor = model.generate(prompt, **{**greedy, **options})
    return out


@pytest.mark.filterwarnings("error")
def test_a_plain_call_is_static_and_says_so_once(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen
) -> None:
    with enable(llama, profile, CONFIG):
        with pytest.warns(UserWarning, match=r'up to 1 tokens on a static cache of 256 slots.*"dynamic"'):
            plain(llama, ids(PROMPT, rows=1))
        plain(llama, ids(PROMPT, rows=1))
        plain(llama, ids(PROMPT, rows=1), cache_implementation="dynamic")
        llama.generation_config.cache_implementation = "dynamic"
        plain(llama, ids(PROMPT, rows=1))
        llama.generation_config.cache_implementation = None
        plain(llama, ids(PROMPT, rows=1), cache_implementation="static")
        plain(torch.compile(llama), ids(PROMPT, rows=1))
    plain(llama, ids(PROMPT, rows=1))
    assert chosen == [256, 256, None, None, PROMPT, 256, None]
    assert "_prepare_cache_for_generation" not in vars(llama)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prefill_chunk_size": 70},
        {"max_cache_len": 300},
        {"return_dict_in_generate": True},
        {"output_hidden_states": True},
        {"disable_compile": True},
        {"prompt_lookup_num_tokens": 2, "max_new_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*max_cache_len")
def test_other_ways_to_generate_keep_their_cache(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen, options: dict[str, Any]
) -> None:
    with enable(llama, profile, CONFIG), warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate decodes")
        plain(llama, ids(PROMPT, rows=1), **options)
    assert set(chosen) == {None}


@pytest.mark.filterwarnings("error:generate decodes")
def test_a_cache_or_a_loop_of_the_users_own_is_kept(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen
) -> None:
    prompt = ids(PROMPT, rows=1)

    def loop(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        model(input_ids, **{name: options[name] for name in decode_cache.CACHE_NAMES if name in options})
        return input_ids

    with enable(llama, profile, CONFIG):
        plain(llama, prompt, **cache_argument(llama, DynamicCache(config=llama.config)))
        plain(llama, prompt, **cache_argument(llama, FasaCache(llama, profile, CONFIG)))
        plain(llama, prompt, custom_generate=loop)
        plain(llama, prompt, use_cache=False)
    assert chosen == [None] * 4


def under_lm_eval(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    """The call from a module of lm_eval."""
    code = (lambda: plain(model, prompt)).__code__
    closure = (types.CellType(model), types.CellType(prompt))
    types.FunctionType(code, {"__name__": "lm_eval.x", "plain": plain}, closure=closure)()


def in_a_thread(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    thread = threading.Thread(target=plain, args=(model, prompt))
    thread.start()
    thread.join()


def with_a_forward_of_its_own(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    model.model.forward = model.model.forward
    plain(model, prompt)


def compiled_in_place(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    model.model.layers[0].mlp.compile(backend="eager")
    plain(model, prompt)


def in_training(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    plain(model.train(), prompt)


def on_two_devices(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    model.elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"))
    plain(model, prompt)


def in_two_processes(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    with mock.patch.multiple(torch.distributed, is_initialized=lambda: True, get_world_size=lambda *of: 2):
        plain(model, prompt)


def uncompiled_by_transformers(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    """As Llama 4."""
    with mock.patch.object(model, "get_compiled_call", return_value=model.__call__):
        plain(model, prompt)


@pytest.mark.parametrize(
    "call",
    [
        under_lm_eval,
        in_a_thread,
        with_a_forward_of_its_own,
        compiled_in_place,
        in_training,
        on_two_devices,
        in_two_processes,
        uncompiled_by_transformers,
    ],
)
@pytest.mark.filterwarnings("error:generate decodes")
def test_it_grows(
    llama: PreTrainedModel,
    profile: FasaProfile,
    ids: Ids,
    chosen: Chosen,
    call: Callable[[PreTrainedModel, torch.Tensor], None],
    fresh_compiler: None,
) -> None:
    with enable(llama, profile, CONFIG):
        call(llama, ids(PROMPT, rows=1))
    assert chosen == [None]


@pytest.mark.filterwarnings("error:generate decodes")
def test_it_grows_where_the_layers_or_the_device_ask_for_it(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(PROMPT, rows=1)
    with enable(llama, profile, CONFIG) as fasa, fasa.sparse_from(torch.tensor([PROMPT])):
        plain(llama, prompt)
    with enable(llama, profile, FasaConfig(n_fac=5, n_tip=2, backend="reference")):
        plain(llama, prompt)
    with enable(llama, config=FasaConfig(n_fac=5), scorer=scorer_factory("quest")):
        plain(llama, prompt)
    with enable(llama, config=CONFIG):  # without a profile, and too short a prompt for one
        plain(llama, ids(127, rows=1))
    with enable(llama, profile, CONFIG):
        monkeypatch.setattr(decode_cache, "WAITING", "cuda")
        plain(llama, prompt)
    assert chosen == [None] * 5


@pytest.mark.filterwarnings("error:generate decodes")
def test_it_grows_where_layers_keep_a_state(chosen: Chosen, ids: Ids) -> None:
    model = build("Qwen3NextForCausalLM")
    with enable(model, profile_of(model), CONFIG):
        assert "_prepare_cache_for_generation" in vars(model)
        plain(model, ids(PROMPT, rows=1))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.filterwarnings("ignore:generate decodes")
def test_it_takes_no_more_than_half_of_the_memory(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """3 layers, 256 slots, keys and values of 2 heads with 16 dimensions in float32."""
    size = rows * 3 * 256 * 2 * 2 * 16 * 4
    with enable(llama, profile, CONFIG):
        for free in (2 * size - 1, 2 * size):
            monkeypatch.setattr(decode_cache, "free_bytes", lambda device, free=free: free)
            plain(llama, ids(PROMPT, rows=rows))
    assert chosen == [None, 256]


def stopped(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, **options: Any) -> None:
    """An answer that may have ``tokens`` and ends after the first."""
    stops = [lambda written, scores: torch.ones(len(written), dtype=torch.bool)]
    plain(model, prompt, tokens, stopping_criteria=stops, **options)


def test_steps_that_waited_pay_for_compiling(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers of 4 tokens waited for 3 steps each, so that the third, of 4, makes them 10."""
    monkeypatch.setattr(decode_cache, "BREAK_EVEN", 10)
    monkeypatch.setattr(decode_cache, "MANY", 4)
    prompt = ids(PROMPT, rows=1)
    with enable(llama, profile, CONFIG):
        with pytest.warns(UserWarning, match=r'4 tokens on a cache that grows.* 10 tokens on.*"static".*"dynamic"'):
            plain(llama, prompt, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain(llama, prompt, 4)
            stopped(llama, prompt, 3)
        with pytest.warns(UserWarning, match="4 tokens on a static cache of 256 slots"):
            stopped(llama, prompt, 4)
    assert chosen == [None, None, None, 256]


@pytest.mark.filterwarnings("ignore:generate decodes")
def test_what_is_compiled_serves_shorter_answers_and_a_second_length_all_others(
    llama: PreTrainedModel, profile: FasaProfile, ids: Ids, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_cache, "BREAK_EVEN", 1000)
    with enable(llama, profile, CONFIG):
        for rows, prompt, tokens in (
            (1, 140, 999),
            (1, 140, 1000),  # 1139 slots and up to a quarter more
            (1, 140, 600),
            (1, 140, 300),  # the cache would be more than twice as long
            (1, 300, 1000),
            (1, 140, 300),
            (2, 140, 600),
        ):
            stopped(llama, ids(prompt, rows=rows), tokens)
        stopped(llama, ids(140, rows=1), 1000, num_return_sequences=2, do_sample=True)
        stopped(llama, ids(140, rows=2), 600)
    assert chosen == [None, 1280, 1280, None, 1536, 512, None, 1280, 1280]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:generate decodes")
def test_the_tokens_are_those_of_a_growing_cache_and_later_calls_compile_nothing(
    llama: PreTrainedModel,
    profile: FasaProfile,
    ids: Ids,
    chosen: Chosen,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
) -> None:
    """Without a profile, from the first call on: the prompt calibrates."""
    counters.clear()
    with enable(llama, config=CONFIG) as fasa:
        for length, tokens, graphs in ((140, 20, 1), (150, 30, 1), (250, 20, 2), (400, 20, 2)):
            prompt = ids(length, seed=length, rows=1)
            written = plain(llama, prompt, tokens)
            assert counters["stats"]["unique_graphs"] == graphs
            counts = fasa.stats.as_dict()
            fasa.stats.reset()
            assert plain(llama, prompt, tokens, cache_implementation="dynamic").equal(written)
            assert fasa.stats.as_dict() == counts
            fasa.stats.reset()
    assert chosen == [256, None, 256, None, 384, None, 512, None]
    assert not counters["graph_break"]
