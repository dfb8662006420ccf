"""Both caches, every backend, growing and static, eager and compiled: 500 greedy steps of the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.core.config import Backend
from fasa_flex.lm_eval.haystack import heldout_text

EVALS = Path(__file__).parents[2] / "evals"
PROMPT, STEPS = 512, 500

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EVALS / "reference_model").eval()


@pytest.fixture(scope="module")
def profile() -> FasaProfile:
    return FasaProfile.from_pretrained(EVALS / "results" / "profile")


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(EVALS / "reference_model")
    return torch.tensor(tokenizer(heldout_text()[: 8 * PROMPT]).input_ids[:PROMPT])[None]


def decode(model: PreTrainedModel, profile: FasaProfile, prompt: Tensor, backend: Backend, **options: Any) -> Tensor:
    """The new tokens; every sparse step is counted."""
    run = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    config = FasaConfig(n_tip=8, n_fac=64, backend=backend)
    with enable(model, profile, config) as fasa:
        out: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **run)
        assert fasa.stats.sparse_queries == 3 * (STEPS - 1)  # three of the four layers
    return out[:, PROMPT:]


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, profile: FasaProfile, prompt: Tensor) -> Tensor:
    """By the plain loops of the reference."""
    return decode(model, profile, prompt, "reference")


def way(kind: str, model: PreTrainedModel, profile: FasaProfile) -> dict[str, Any]:
    """Options of ``generate``: transformers' own caches, which `enable` packs, or one made ahead."""
    if kind in ("growing", "plain static"):
        return {} if kind == "growing" else {"cache_implementation": "static"}
    options: dict[str, Any] = {"max_cache_len": PROMPT + STEPS} if "static" in kind else {}
    placement = "host" if "host" in kind else "device"
    return {"past_key_values": FasaCache(model, profile, FasaConfig(n_tip=8, n_fac=64), placement=placement, **options)}


@pytest.mark.parametrize("kind", ["growing", "growing host", "static", "static host"])
def test_gather(model: PreTrainedModel, profile: FasaProfile, prompt: Tensor, expected: Tensor, kind: str) -> None:
    assert torch.equal(decode(model, profile, prompt, "gather", **way(kind, model, profile)), expected)


@pytest.mark.parametrize("kind", ["plain static", "static host"])
def test_gather_in_a_compiled_model(
    model: PreTrainedModel, profile: FasaProfile, prompt: Tensor, expected: Tensor, fresh_compiler: None, kind: str
) -> None:
    compiled = CompileConfig(fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # generate compiles on accelerators only, unless told
    counters.clear()
    tokens = decode(model, profile, prompt, "gather", compile_config=compiled, **way(kind, model, profile))
    assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_flex(
    model: PreTrainedModel, profile: FasaProfile, prompt: Tensor, expected: Tensor, fresh_compiler: None, kind: str
) -> None:
    assert torch.equal(decode(model, profile, prompt, "flex", **way(kind, model, profile)), expected)
