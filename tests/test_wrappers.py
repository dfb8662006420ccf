"""Models within PEFT's, compiled and data-parallel ones, and what is no model, profile or configuration at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import Ids, profile_of
from torch import nn
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, RotaryLayout, calibrate, enable
from fasa_flex.baselines import channel_weights
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.wrappers import unwrapped

CONFIG = FasaConfig(n_fac=8, n_tip=2)


class Adapter(nn.Module):
    """As PEFT's: a transformers model two modules down, whose attributes it answers for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self) -> PreTrainedModel:
        model: Any = self.base_model["model"]
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.get_base_model()(*arguments, **options)


class Parallel(nn.Module):
    """As DistributedDataParallel, which needs processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "adapter": Adapter,
    "compiled": compiled,
    "compiled adapter": lambda model: compiled(Adapter(model)),
    "parallel adapter": lambda model: Parallel(Adapter(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_within_is_found(llama: PreTrainedModel, wrap: Callable[[PreTrainedModel], Any]) -> None:
    assert unwrapped(wrap(llama)) is llama
    assert unwrapped(llama) is llama
    assert isinstance(unwrapped(nn.Linear(2, 2)), nn.Linear)


@pytest.mark.parametrize("name", ["adapter", "compiled"])
def test_a_wrapped_model_is_calibrated_and_sparse_as_it_is_without(llama: PreTrainedModel, ids: Ids, name: str) -> None:
    wrapper, prompt, sample = WRAPPERS[name](llama), ids(40, rows=1), ids(40)
    profile = calibrate(wrapper, [sample], top_k=8, max_new_tokens=2, progress=False)
    expected = calibrate(llama, [sample], top_k=8, max_new_tokens=2, progress=False)
    assert torch.equal(profile.agreement, expected.agreement)
    assert torch.equal(RotaryLayout.detect(wrapper).chunks, profile.layout.chunks)
    assert torch.equal(channel_weights(wrapper, [sample]), channel_weights(llama, [sample]))
    decoded = []
    for model in (llama, wrapper):
        with torch.no_grad(), enable(model, profile, CONFIG) as fasa:
            cache = FasaCache(model, profile, CONFIG)
            held = cache_argument(llama, cache)
            model(prompt, **held)
            decoded.append(model(prompt[:, :1], **held).logits)
        assert fasa.stats.sparse_queries
    assert torch.allclose(*decoded, atol=1e-4)
    assert llama.config._attn_implementation == "sdpa"


def test_what_is_no_profile_or_configuration_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    profile = profile_of(llama)
    mistakes: list[tuple[Any, Any, str]] = [
        (tmp_path, CONFIG, "profile must be a FasaProfile, got PosixPath"),
        ("auto", CONFIG, "profile must be a FasaProfile, got 'auto'; read one with FasaProfile.from_pretrained"),
        (profile, {"n_fac": 8}, "config must be a FasaConfig, got {'n_fac': 8}; make one with FasaConfig"),
    ]
    for given, config, sentence in mistakes:
        for make in (enable, FasaCache):
            with pytest.raises(ValueError, match=rf"^{sentence}"):
                make(llama, given, config)
    assert llama.config._attn_implementation == "sdpa"
