"""Random schedules of continuous batching: every request's tokens are those of its own run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batching import GREEDY, batching
from families import tiny
from generation import profile_of
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import cases
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, enable

CONFIGS = (
    FasaConfig(n_fac=24),
    FasaConfig(n_fac=16, completion="none", dense_layers=(), group_reduce="max"),
    FasaConfig(n_fac=20, completion="mean", packed_dtype="int8"),
    FasaConfig.paper(n_fac=16),
)
WORDS, MOST = 60, 120
_alone: dict[tuple[int, tuple[int, ...], int], list[int]] = {}


@pytest.fixture(scope="module")
def enabled() -> tuple[PreTrainedModel, FasaProfile]:
    model = tiny("Llama")
    return model, profile_of(model, mean_key=True)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[list[int], int, bool]]:
    """Requests in the order of their arrival: prompt, number of new tokens, and whether it is cancelled.

    Some prompts begin with blocks of an earlier one, or repeat it.
    """
    requests: list[tuple[list[int], int, bool]] = []
    for _ in range(draw(st.integers(2, 6))):
        seed, length = draw(st.integers(0, 3)), draw(st.integers(2, MOST))
        generator = torch.Generator().manual_seed(seed)
        prompt = (torch.randperm(WORDS, generator=generator).repeat(2) + 3)[:length].tolist()
        if draw(st.booleans()):
            prompt += (torch.randperm(WORDS, generator=generator) + 3)[: draw(st.integers(0, 40))].tolist()
        requests.append((prompt, draw(st.integers(1, 30)), draw(st.integers(0, 5)) == 0))
    return requests


def expected(model: PreTrainedModel, config: int, prompt: list[int], new: int) -> list[int]:
    """The request's own run, while the config is enabled."""
    key = config, tuple(prompt), new
    if key not in _alone:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
        _alone[key] = out[0, len(prompt) :].tolist()
    return _alone[key]


@cases(0.2)
@given(
    requests=schedules(),
    config=st.integers(0, len(CONFIGS) - 1),
    page=st.sampled_from([4, 16, 32]),
    tokens=st.sampled_from([8, 48, 256]),
    tight=st.booleans(),
    forks=st.integers(1, 2),
)
def test_requests_do_not_see_each_other(
    enabled: tuple[PreTrainedModel, FasaProfile],
    requests: list[tuple[list[int], int, bool]],
    config: int,
    page: int,
    tokens: int,
    tight: bool,
    forks: int,
) -> None:
    model, profile = enabled
    blocks = (MOST + 80) // page + 2 if tight else 1600 // page  # tight: room for one request of the longest kind
    with enable(model, profile, CONFIGS[config]):
        wanted = [expected(model, config, prompt, new) for prompt, new, _ in requests]
        with model.continuous_batching_context_manager(
            generation_config=GREEDY,
            continuous_batching_config=batching(page, blocks, tokens),
        ) as manager:
            manager.num_return_sequences = forks
            names = [manager.add_request(prompt, max_new_tokens=new) for prompt, new, _ in requests]
            for name, (_, _, cancelled) in zip(names, requests, strict=True):
                if cancelled:
                    manager.cancel_request(name)
            answers = _collect(manager, [name for name, each in zip(names, requests, strict=True) if not each[2]])
    for name, want, (prompt, new, _) in zip(names, wanted, requests, strict=True):
        for answer in (answers.get(name), answers.get(f"{name}__child#0")):
            assert answer in (None, want), (len(prompt), new)


def _collect(manager: Any, names: list[str]) -> dict[str, list[int]]:
    """New tokens by name, once all of ``names`` have finished; forks that finish in time are among them."""
    answers: dict[str, list[int]] = {}
    while not set(names) <= set(answers):
        result = manager.get_result(timeout=30)
        assert result is not None
        assert result.error is None, result.error
        if result.is_finished():
            answers[result.request_id] = result.generated_tokens
    return answers
