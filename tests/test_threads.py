"""One model in several threads: each with its own prompt, boundary and mask; enabled and disabled in between."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import Ids, generate, profile_of
from torch import nn
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult
from fasa_flex.hf.attention_routing import AttentionSeam

CONFIG = FasaConfig(n_fac=16, n_tip=2)


class Pause:
    """A hook on a module that stops the first thread that comes by, until it is let go on."""

    def __init__(self, module: nn.Module) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._hook = module.register_forward_hook(self._stop)

    def _stop(self, *_: object) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(60)

    def finish(self, *threads: threading.Thread) -> None:
        self.go.set()
        for thread in threads:
            thread.join(60)
        self._hook.remove()


def start(work: Callable[[], Any], results: list[Any]) -> threading.Thread:
    """A thread that appends what ``work`` returns, or the error that it ends in."""

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # handed to the test, which compares results
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_short_answer_in_another_thread_leaves_a_calibration_alone(llama: PreTrainedModel, ids: Ids) -> None:
    long, short = ids(160, rows=1), ids(20, rows=1)
    with enable(llama, config=CONFIG) as fasa:
        expected = generate(llama, long)[1]
    with enable(llama, config=CONFIG) as fasa:
        pause, results = Pause(llama.model.layers[1].mlp), list[Any]()
        thread = start(lambda: generate(llama, long)[1], results)
        assert pause.reached.wait(60)  # two of three layers are measured
        generate(llama, short, max_new_tokens=3)
        pause.finish(thread)
        assert torch.equal(results[0], expected)
        assert fasa.profile is not None
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 11, 11]


def test_two_long_prompts_at_once_and_the_first_to_end_decides(llama: PreTrainedModel, ids: Ids) -> None:
    slow, fast = ids(200, rows=1, seed=1), ids(160, rows=1)
    with enable(llama, config=CONFIG) as fasa:
        expected = generate(llama, fast)[1]
        wanted = fasa.profile
    assert wanted is not None
    with enable(llama, wanted, CONFIG):
        expected_slow = generate(llama, slow)[1]
    with enable(llama, config=CONFIG) as fasa:
        pause, results = Pause(llama.model.layers[1].mlp), list[Any]()
        thread = start(lambda: generate(llama, slow)[1], results)
        assert pause.reached.wait(60)
        got = generate(llama, fast)[1]
        pause.finish(thread)
        assert fasa.profile is not None
        assert torch.equal(fasa.profile.agreement, wanted.agreement)
    assert torch.equal(got, expected)
    assert torch.equal(results[0], expected_slow)


def test_enabling_while_another_thread_generates(llama: PreTrainedModel, ids: Ids) -> None:
    """Its forward ends sparse where it began dense; the next ones are sparse."""
    profile, prompt = profile_of(llama), ids(40, rows=1)
    pause, results = Pause(llama.model.layers[0].mlp), list[Any]()
    thread = start(lambda: generate(llama, prompt)[0], results)
    assert pause.reached.wait(60)
    with enable(llama, profile, CONFIG) as fasa:
        pause.finish(thread)
        assert isinstance(results[0], torch.Tensor)
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 11, 11]


def test_a_boundary_is_of_its_thread(llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(40, rows=1)
    with enable(llama, profile_of(llama), CONFIG) as fasa, torch.no_grad():
        dense = llama(prompt).logits
        results = list[Any]()
        with fasa.sparse_from(torch.tensor([20])):
            assert not torch.equal(llama(prompt).logits, dense)
            start(lambda: llama(prompt).logits.detach(), results).join(60)
    torch.testing.assert_close(results[0], dense)


def test_disabling_while_another_thread_generates_says_so_and_counts(llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(40, rows=1)
    dense = generate(llama, prompt)[0]
    fasa = enable(llama, profile_of(llama), CONFIG)
    pause, results = Pause(llama.model.layers[2].mlp), list[Any]()
    thread = start(lambda: generate(llama, prompt)[0], results)
    assert pause.reached.wait(60)
    with pytest.warns(UserWarning, match="1 other thread generates, whose answer is dense from here on") as caught:
        fasa.disable()
    assert "\n" not in str(caught[0].message)
    pause.finish(thread)
    assert fasa.stats.interrupted == 1
    assert torch.equal(results[0], dense)  # all of it was decoded after the end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fasa.disable()
        with enable(llama, profile_of(llama), CONFIG) as again:
            start(lambda: generate(llama, prompt)[0], results).join(60)  # done before the end
        assert again.stats.interrupted == 0


def test_a_thread_that_generates_is_not_measured(llama: PreTrainedModel, ids: Ids) -> None:
    """While this thread probes the model, whose attention gives zeros then, another one's answer is the dense one."""
    prompt, answers, probed = ids(20, rows=1), list[Any](), list[int]()
    dense = generate(llama, prompt)[1]

    def zeros(call: AttentionCall) -> AttentionResult:
        probed.append(threading.get_ident())
        return torch.zeros_like(call.query).transpose(1, 2), None

    with AttentionSeam(llama, zeros):
        start(lambda: generate(llama, prompt)[1], answers).join(60)
        assert not probed
        llama(prompt)
    assert torch.equal(answers[0], dense)
    assert set(probed) == {threading.get_ident()}
