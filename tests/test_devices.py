"""Weights that are elsewhere until they are needed, or are no parameters: FASA runs where dense generation does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from families import tiny
from generation import Ids, generate
from torch import nn
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, RotaryLayout, calibrate, enable
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.model_structure import device_of

CONFIG = FasaConfig(n_fac=6, n_tip=2)


class BufferLinear(nn.Module):
    """A linear layer whose weight is a buffer, as of quantised ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight)


class HiddenLinear(nn.Module):
    """A linear layer that shows no weight at all, as of packed ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = (linear.weight.detach(),)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, *self._packed)


def replaced(model: PreTrainedModel, kind: Callable[[nn.Linear], nn.Module]) -> None:
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, kind(child))


WAYS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "disk": lambda model, path: accelerate.disk_offload(model, str(path), execution_device=torch.device("cpu")),
    "cpu": lambda model, path: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "a part": lambda model, path: accelerate.dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        main_device="cpu",
        offload_dir=str(path),
    ),
    "buffers": lambda model, path: replaced(model, BufferLinear),
    "no tensors": lambda model, path: replaced(model, HiddenLinear),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_model_whose_weights_are_elsewhere_decodes_as_it_does_with_them(
    way: Callable[[PreTrainedModel, Path], object], ids: Ids, tmp_path: Path
) -> None:
    prompt, model = ids(40, rows=1), tiny("Llama")
    expected_profile = calibrate(model, [prompt[0]], top_k=8, max_new_tokens=2, progress=False)
    with enable(model, expected_profile, CONFIG):
        expected = generate(model, prompt)[1]
    way(model, tmp_path)
    assert device_of(model).type == "cpu"
    profile = calibrate(model, [prompt[0]], top_k=8, max_new_tokens=2, progress=False)
    torch.testing.assert_close(profile.agreement, expected_profile.agreement)
    with enable(model, profile, CONFIG) as fasa:
        torch.testing.assert_close(generate(model, prompt)[1], expected, atol=1e-5, rtol=1e-5)
        made = FasaCache(model, profile, CONFIG)
        torch.testing.assert_close(
            generate(model, prompt, **cache_argument(model, made))[1], expected, atol=1e-5, rtol=1e-5
        )
        assert fasa.stats.sparse_queries == 2 * 2 * 11
    with enable(model, config=FasaConfig(n_fac=16)) as fasa:
        generate(model, ids(160, rows=1))
        assert fasa.profile is not None
        assert fasa.stats.sparse_queries == 2 * 11


def test_in_half_precision_too(ids: Ids, tmp_path: Path) -> None:
    model = tiny("Llama").bfloat16()
    layout = RotaryLayout.detect(model)
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert RotaryLayout.detect(model) == layout
