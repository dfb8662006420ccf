"""Fixtures for every room: tiny seeded random models by family, and a way to read what their attention receives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton asks when it is imported, by whoever is first

import pytest
import torch
from families import FAMILIES, VOCABULARY, Family, tiny, word_tokenizer
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

settings.register_profile(
    "ci", max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# the property tests scale max_examples by their cost (tests/properties/calls.py): `deep` makes 10^5 cases in all
settings.register_profile(
    "deep", max_examples=4000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "mutants",
    parent=settings.get_profile("ci"),
    max_examples=20,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("ci")

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

SUPPORTED = ("Llama", "Mistral", "Qwen2", "Qwen3")  # the families of tests that need no more; integration/ has them all


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("Llama", seed=0)`: a fresh tiny model."""
    return tiny


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny("Llama")


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """A model with absolute positions and without RoPE."""
    return tiny("GPT2")


@pytest.fixture(params=FAMILIES.values(), ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Every RoPE family, both layouts, whole and partial."""
    chosen: Family = request.param
    return chosen


@pytest.fixture(params=SUPPORTED)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each family that `enable` supports."""
    return tiny(request.param)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """The test compiles for itself, and leaves no graph to the next one, whether it passes or not."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def token_ids(length: int, seed: int = 0, rows: int | None = None) -> Tensor:
    """Random token ids [length], or [rows, length], neither padding nor the first token.

    The first 61 of a row are all different: the slowest planes hardly tell a token from its repetition, and float32 not
    at all, so that repetitions would make near-ties, which a library in float32 and an oracle in float64 may rank
    differently.
    """
    generator = torch.Generator().manual_seed(seed)
    words = VOCABULARY - 3
    drawn = [
        torch.cat([torch.randperm(words, generator=generator) for _ in range(length // words + 1)])[:length] + 3
        for _ in range(rows or 1)
    ]
    return drawn[0] if rows is None else torch.stack(drawn)


@pytest.fixture
def ids() -> Callable[..., Tensor]:
    """`ids(length, seed=0, rows=None)`: random token ids."""
    return token_ids


Reader = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


@contextmanager
def _attention(model: PreTrainedModel, reader: Reader) -> Iterator[None]:
    """Run the model's attention through `reader(layer, q, k, v)`, post-RoPE; None from it means plain dense attention.

    Plain means float64 matrices and an explicit softmax, for unpadded input only.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        assert mask is None or bool(mask.any(-1).all()), "the test's attention is for unpadded input"
        out = reader(int(module.layer_idx), query, key, value)
        if out is None:
            group = query.shape[1] // key.shape[1]
            keys, values = (x.double().repeat_interleave(group, 1) for x in (key, value))
            queries, length = query.shape[2], key.shape[2]
            causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
            logits = (query.double() @ keys.mT * scaling).masked_fill(~causal, -torch.inf)
            out = (logits.softmax(-1) @ values).to(query.dtype)
        return out.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@pytest.fixture
def attention() -> Callable[[PreTrainedModel, Reader], object]:
    """`with attention(model, reader): model(...)`: replace or watch a model's attention, without the library."""
    return _attention


@pytest.fixture
def capture() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """`capture(model, ids, position_ids=None)`: post-RoPE (q, k) of every layer in one plain forward pass."""

    def run(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            seen[layer] = (q.detach(), k.detach())

        mask = torch.ones_like(ids)
        with _attention(model, keep), torch.no_grad():
            model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        return [seen[layer] for layer in sorted(seen)]

    return run
