"""The probing forward: what it sees of every family, and that it leaves no trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from families import LAYERS, Family, tiny
from generation import Ids, profile_of
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.hf.arrival import Arrival
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.hf.probe import check_attention, glance

UNROTATED = {"SmolLM3 (layers without RoPE)": {2}, "Cohere2": {1}}


def rotates(arrived: Arrival) -> bool:
    """Whether the queries of a glance differ between positions by more than half precision's rounding."""
    query = arrived.query.double()
    return bool((query - query[:, :, :1]).abs().max() > query.abs().mean() / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_glance_sees_every_layer_of_every_family(family: Family, dtype: torch.dtype) -> None:
    model = tiny(family.name).to(dtype)
    arrivals = glance(model)
    assert list(arrivals) == list(range(LAYERS))
    _, heads, kv_heads, head_dim = attention_shape(model)
    for layer, arrived in arrivals.items():
        assert rotates(arrived) is (layer not in UNROTATED.get(family.name, ()))
        assert arrived.cache is not None
        tokens = arrived.query.shape[2]
        assert arrived.query.shape == (1, heads, tokens, head_dim)
        assert arrived.key_shape == (1, kv_heads, tokens, head_dim)
        assert arrived.mask is not None
        padding = arrived.mask[0, 0, 1, 0]
        assert padding.item() is False or padding < -1e3


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_queries_that_turn_slowly_are_seen_to_turn(name: str) -> None:
    rope = {"rope_type": name, "rope_theta": 1e6, "factor": 32.0, "original_max_position_embeddings": 512}
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if name == "llama3" else {}
    model = tiny("Llama", rope_parameters=rope | extra, max_position_embeddings=16384).to(torch.bfloat16)
    assert all(map(rotates, glance(model).values()))


def test_a_glance_reads_no_weights_of_linear_layers(llama: PreTrainedModel) -> None:
    expected = [arrived.query for arrived in glance(llama).values()]
    for module in llama.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.fill_(torch.nan)
    assert all(map(torch.equal, (arrived.query for arrived in glance(llama).values()), expected))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_enable_leaves_the_model_as_it_was(training: bool, inference: bool, ids: Ids) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    model = tiny("Llama", max_position_embeddings=128, rope_parameters=rope, attention_dropout=0.1)
    profile, prompt = profile_of(model), ids(200, rows=1)
    with torch.no_grad():
        expected = model(prompt).logits  # which stretches its frequencies
    model.train(training)
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        fasa = enable(model, profile, FasaConfig(n_fac=6))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert fasa.stats.sparse_queries == fasa.stats.dense_queries == 0
    fasa.disable()
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, expected)


def test_a_model_whose_weights_are_brought_when_needed_is_seen(llama: PreTrainedModel) -> None:
    accelerate.cpu_offload(llama, "cpu")
    assert llama.device.type == "meta"
    assert list(map(rotates, glance(llama).values())) == [True] * LAYERS


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda model: model.to("meta"), "meta"),
        (lambda model: setattr(model.model, "forward", lambda **_: 1 / 0), "ZeroDivisionError: division by zero"),
    ],
    ids=["meta", "its own error"],
)
def test_a_model_that_cannot_run_is_not_checked_and_that_is_said(
    break_: Callable[[PreTrainedModel], Any], reason: str, llama: PreTrainedModel
) -> None:
    break_(llama)
    with pytest.warns(UserWarning, match=rf"LlamaModel cannot run .*{reason}.* is not checked") as said:
        check_attention(llama)
    assert "\n" not in str(said[0].message)
    assert llama.config._attn_implementation == "sdpa"


def test_what_the_user_compiled_is_not_compiled_for_a_probe(llama: PreTrainedModel) -> None:
    compiled: list[object] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph

    for layer in llama.model.layers:
        layer.compile(backend=backend)
    assert len(glance(llama)) == LAYERS
    assert not compiled


def test_enable_checks_once_and_probes_for_a_layout_where_it_is_given_none(llama: PreTrainedModel) -> None:
    profile, forwards = profile_of(llama), []
    llama.model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (profile, None):
            enable(llama, given).disable()
            assert len(forwards) == (1 if given else 2)
            forwards.clear()


def test_probes_in_two_threads_leave_compilation_as_it_was(llama: PreTrainedModel) -> None:
    """The first to begin ends first: the other one must not restore what the first had set."""
    begun, go, second = threading.Event(), threading.Event(), tiny("Llama", seed=1)
    inside, finished = threading.Event(), threading.Event()

    def first_waits(*_: object) -> None:
        begun.set()
        assert go.wait(60)

    def second_waits(*_: object) -> None:
        inside.set()
        assert finished.wait(60)

    llama.model.register_forward_pre_hook(first_waits)
    second.model.register_forward_pre_hook(second_waits)

    def end_first() -> None:
        glance(llama)
        finished.set()

    threads = [threading.Thread(target=end_first), threading.Thread(target=glance, args=(second,))]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    inside.wait(1)  # without turns the second has begun by now
    go.set()
    for thread in threads:
        thread.join(60)
    compiled: list[object] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph

    torch.compile(lambda states: states + 1, backend=backend)(torch.ones(2))
    assert compiled
