"""The tables of a profile: all come back, those of older profiles too, and every criterion chooses by its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from sentences import raises_sentence
from torch import Tensor

from fasa_flex import FasaProfile, calibrate

HEADS, KV_HEADS, CHUNKS, LAYERS = 4, 2, 8, 3


@pytest.fixture(scope="module")
def profile() -> FasaProfile:
    """Agreement alone, as in the first format."""
    from conftest import tiny, token_ids

    made = calibrate(tiny("Llama"), [token_ids(40)], top_k=8, max_new_tokens=6, progress=False)
    return FasaProfile(made.agreement, made.layout, made.provenance)


def explained(profile: FasaProfile, seed: int = 0) -> FasaProfile:
    """The profile with agreement, variance, covariance and mean key of random parts."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(LAYERS, HEADS, CHUNKS, CHUNKS, generator=generator)
    each = factors @ factors.mT
    return FasaProfile(
        profile.agreement,
        profile.layout,
        profile.provenance,
        variance=each.diagonal(dim1=-2, dim2=-1),
        covariance=each.view(LAYERS, KV_HEADS, -1, CHUNKS, CHUNKS).mean(2),
        mean_key=torch.randn(LAYERS, KV_HEADS, 2 * CHUNKS, generator=generator),
    )


def test_all_tables_come_back_exactly(profile: FasaProfile, tmp_path: Path) -> None:
    whole = explained(profile)
    whole.save_pretrained(tmp_path)
    loaded = FasaProfile.from_pretrained(tmp_path)
    for name in ("agreement", "variance", "covariance", "mean_key"):
        assert torch.equal(getattr(loaded, name), getattr(whole, name))
        assert getattr(loaded, name).dtype == torch.float32
    assert loaded.fingerprint == whole.fingerprint
    assert json.loads((tmp_path / "config.json").read_text())["fasa_profile"]["format"] == 2
    assert loaded.fingerprint != explained(profile, seed=1).fingerprint
    assert loaded.criteria == ("agreement", "variance", "explained_variance", "weighted_variance")


def test_a_profile_of_the_first_format_is_what_it_was(profile: FasaProfile, tmp_path: Path) -> None:
    """Its files as the first release wrote them; the fingerprint is that of its description."""
    from safetensors.torch import save

    data = save({"agreement": profile.agreement})
    fields = {
        "format": 1,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "layout": profile.layout.to_dict(),
        "provenance": dataclasses.asdict(profile.provenance),
    }
    description = json.dumps({"fasa_profile": fields}, indent=2, sort_keys=True)
    (tmp_path / "agreement.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text(description)
    loaded = FasaProfile.from_pretrained(tmp_path)
    assert loaded.criteria == ("agreement",)
    assert (loaded.variance, loaded.covariance) == (None, None)
    assert torch.equal(loaded.mean_key, torch.zeros(LAYERS, KV_HEADS, 2 * CHUNKS))
    assert torch.equal(loaded.dominant(3), loaded.dominant(3, criterion="agreement"))
    assert loaded.fingerprint == hashlib.sha256(description.encode()).hexdigest()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == description
    assert (tmp_path / "again" / "agreement.safetensors").read_bytes() == data
    with raises_sentence(ValueError, match=r"serves agreement and was made before .* was measured; calibrate"):
        loaded.dominant(3, criterion="variance")


@pytest.mark.parametrize("n_tip", [1, 3, CHUNKS])
def test_variance_is_averaged_over_the_group_and_chooses_where_it_is_known(profile: FasaProfile, n_tip: int) -> None:
    whole = explained(profile)
    assert whole.variance is not None
    for per, kv_heads in (("kv_head", KV_HEADS), ("query_head", None)):
        for layer in range(LAYERS):
            expected = oracle.dominant(whole.variance[layer].double().numpy(), n_tip, kv_heads).tolist()
            assert whole.dominant(n_tip, per)[layer].tolist() == expected
            assert (
                whole.dominant_dims(n_tip, per, "variance")[layer].tolist()
                == whole.layout.chunks[torch.tensor(expected)].tolist()
            )
    assert torch.equal(whole.dominant(n_tip, criterion="agreement"), profile.dominant(n_tip, criterion="agreement"))


def test_explained_variance_knows_of_correlation_and_variance_does_not(profile: FasaProfile) -> None:
    """Chunks 0 and 1 cancel each other, chunk 2 is smaller than both and all that is left."""
    table = torch.diag(torch.tensor([4.0, 4, 1, 0.5, 0.25, 0, 0, 0]))
    table[0, 1] = table[1, 0] = -4
    made = FasaProfile(
        profile.agreement,
        profile.layout,
        profile.provenance,
        variance=table.diagonal().expand(LAYERS, HEADS, -1),
        covariance=table.expand(LAYERS, KV_HEADS, -1, -1),
    )
    assert made.dominant(2)[0].tolist() == [[0, 1]] * KV_HEADS
    for criterion in ("explained_variance", "weighted_variance"):
        assert made.dominant(2, criterion=criterion)[0].tolist() == [[2, 3]] * KV_HEADS


def test_weights_come_with_the_chunks_and_for_one_criterion_alone(profile: FasaProfile) -> None:
    whole = explained(profile)
    assert whole.covariance is not None
    weights = whole.weights(3, "weighted_variance")
    assert weights is not None
    assert (weights.shape, weights.dtype) == ((LAYERS, KV_HEADS, 3), torch.float32)
    chosen, table = whole.dominant(3, criterion="weighted_variance")[1, 0], whole.covariance[1, 0].double()
    expected = torch.linalg.solve(table[chosen][:, chosen], table[chosen].sum(1))
    torch.testing.assert_close(weights[1, 0].double(), expected, rtol=1e-4, atol=1e-5)
    assert (weights - 1).abs().max() > 0.1
    for criterion in (None, "agreement", "variance", "explained_variance"):
        assert whole.weights(3, criterion) is None


@pytest.mark.parametrize("criterion", ["explained_variance", "weighted_variance"])
def test_what_is_known_of_kv_heads_alone_is_refused_for_query_heads(profile: FasaProfile, criterion: Any) -> None:
    with raises_sentence(ValueError, match="per='kv_head'"):
        explained(profile).dominant(3, "query_head", criterion)


def test_an_unknown_criterion_is_refused(profile: FasaProfile) -> None:
    with pytest.raises(ValueError, match="criterion must be one of 'agreement', 'variance'"):
        profile.dominant(1, criterion="magic")  # type: ignore[arg-type] # what a user may write


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"variance": torch.zeros(LAYERS, KV_HEADS, CHUNKS)}, "variance must be"),
        ({"variance": torch.full((LAYERS, HEADS, CHUNKS), -1.0)}, "negative"),
        ({"variance": torch.full((LAYERS, HEADS, CHUNKS), torch.inf)}, "finite"),
        ({"covariance": torch.zeros(LAYERS, HEADS, CHUNKS, CHUNKS)}, "covariance must be"),
        ({"covariance": -torch.ones(LAYERS, KV_HEADS, CHUNKS, CHUNKS)}, "negative"),
        ({"covariance": torch.full((LAYERS, KV_HEADS, CHUNKS, CHUNKS), torch.nan)}, "finite"),
        ({"mean_key": torch.zeros(LAYERS, KV_HEADS, CHUNKS)}, "mean_key must be"),
    ],
)
def test_tables_that_mean_nothing_are_refused(profile: FasaProfile, tables: dict[str, Tensor], reason: str) -> None:
    with raises_sentence(ValueError, match=reason):
        FasaProfile(profile.agreement, profile.layout, profile.provenance, **tables)


def test_a_profile_owns_its_tables(profile: FasaProfile) -> None:
    """What is measured next into the same tensor is not this profile's."""
    table = torch.zeros(LAYERS, HEADS, CHUNKS)
    made = FasaProfile(table, profile.layout, profile.provenance, variance=table)
    table += 1
    assert not made.agreement.any()
    assert made.variance is not None
    assert not made.variance.any()
