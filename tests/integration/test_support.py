"""The support matrix: every family in every way of generating, dense at a full budget and the method at a small one."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from families import FAMILIES, LAYERS, Family, tiny
from generation import profile_of
from transformers import PreTrainedModel
from ways import BUFFER, PROMPT, WAYS, Way, possible

from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.model.handle import Fasa


@functools.cache
def setup(name: str) -> tuple[PreTrainedModel, FasaProfile]:
    model = tiny(name)
    return model, profile_of(model)


def boundary(fasa: Fasa, way: Way) -> AbstractContextManager[None]:
    """A verifying forward is no prefill: what it decodes is sparse, as one token at a time would be."""
    return fasa.sparse_from(torch.tensor([PROMPT])) if way.boundary else nullcontext()


@pytest.mark.filterwarnings("ignore:every layer of")
@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, id=f"{family.name}-{way.name}")
        for family in FAMILIES.values()
        for way in WAYS.values()
        if possible(family, way)
    ],
)
def test_supported(family: Family, way: Way) -> None:
    model, profile = setup(family.name)
    dense_tokens, dense_logits = way.run(model)

    with enable(model, profile, FasaConfig(n_fac=BUFFER - 1, dense_layers=())) as fasa, boundary(fasa, way):
        tokens, logits = way.run(model)
        assert fasa.stats.sparse_queries == 0
    assert torch.equal(tokens, dense_tokens)
    torch.testing.assert_close(logits, dense_logits, atol=1e-4, rtol=1e-4)

    results = []
    for backend in ("gather", "reference"):
        config = FasaConfig(n_fac=6, n_sink=1, backend=backend)
        with enable(model, profile, config) as fasa, boundary(fasa, way):
            results.append(way.run(model))
            counts = [layer.sparse_queries for layer in fasa.stats.per_layer]
        assert [layer for layer, count in enumerate(counts) if count] == list(family.sparse)
        assert [layer for layer in range(LAYERS) if layer not in fasa.dense_layers] == list(family.sparse)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)
    after_tokens, after_logits = way.run(model)  # both handles are closed
    assert torch.equal(after_tokens, dense_tokens)
    assert torch.equal(after_logits, dense_logits)
    if family.sparse:  # the budget matters here, so the comparison says something
        shape = min(results[0][1].shape[1], dense_logits.shape[1])
        assert (results[0][1][:, :shape] - dense_logits[:, :shape]).abs().max() > 1e-2
