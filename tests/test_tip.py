"""The scorers that a profile and a config make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import plain
from generation import profile_of
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile
from fasa_flex.calibration.profile_scorers import dominant_chunks


@pytest.fixture
def whole(llama: PreTrainedModel) -> FasaProfile:
    """A profile that serves every criterion: 3 layers, 4 query heads, 2 key/value heads, 8 chunks."""
    bare, draw = profile_of(llama, mean_key=True), torch.Generator().manual_seed(1)
    factors = torch.randn(3, 2, 8, 8, generator=draw)
    tables = {"variance": torch.rand(bare.agreement.shape, generator=draw), "covariance": factors @ factors.mT}
    return FasaProfile(bare.agreement, bare.layout, bare.provenance, mean_key=bare.mean_key, **tables)


@pytest.mark.parametrize(
    ("asked", "criterion"),
    [(None, "variance"), ("agreement", "agreement"), ("explained_variance", "explained_variance")],
)
def test_a_layers_scorer_holds_chunks_mean_key_and_precision(whole: FasaProfile, asked: Any, criterion: Any) -> None:
    make = dominant_chunks(whole, FasaConfig(criterion=asked))
    for layer in range(3):
        scorer = make(layer)
        assert scorer.dims.equal(whole.dominant_dims(4, "kv_head", criterion)[layer].flatten(1))  # half of 8 chunks
        assert scorer.mean_key.equal(whole.mean_key[layer])
        assert (scorer.weights, scorer.dtype) == (None, "int4")
        assert not scorer.dims.is_inference()


def test_weights_are_those_of_each_chunks_two_dimensions(whole: FasaProfile) -> None:
    scorer = dominant_chunks(whole, FasaConfig(criterion="weighted_variance", n_tip=3, packed_dtype=None))(2)
    weights = whole.weights(3, "weighted_variance")[2]
    assert scorer.weights[:, ::2].equal(weights)
    assert scorer.weights[:, 1::2].equal(weights)
    assert scorer.dtype is None


def test_sets_of_query_heads_and_profiles_without_a_mean_key_have_none(
    whole: FasaProfile, llama: PreTrainedModel
) -> None:
    by_query_head = dominant_chunks(whole, FasaConfig.paper())(1)
    assert by_query_head.dims.equal(whole.dominant_dims(2, "query_head", "agreement")[1].flatten(1))
    assert (by_query_head.mean_key, by_query_head.weights, by_query_head.dtype) == (None, None, None)
    assert dominant_chunks(profile_of(llama), plain())(1).mean_key is None


def test_scorers_rank_as_each_other_where_they_pack_alike(whole: FasaProfile) -> None:
    """A cache of the one then serves the other."""
    one = dominant_chunks(whole, FasaConfig())(1)
    assert one.ranks_as(dominant_chunks(whole, FasaConfig(n_fac=7, completion="mean"))(1))
    assert not one.ranks_as(dominant_chunks(whole, FasaConfig())(2))
    assert not one.ranks_as(dominant_chunks(whole, FasaConfig(packed_dtype="int8"))(1))
    bare = FasaProfile(whole.agreement, whole.layout, whole.provenance, variance=whole.variance)
    assert not one.ranks_as(dominant_chunks(bare, FasaConfig())(1))


def test_more_chunks_than_a_head_has_are_refused(whole: FasaProfile) -> None:
    with pytest.raises(ValueError, match=r"n_tip must lie in 1\.\.8, .* got 9"):
        dominant_chunks(whole, FasaConfig(n_tip=9))
