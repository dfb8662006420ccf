"""What a profile is said to hold, against tables small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fasa_flex import FasaProfile, RotaryLayout
from fasa_flex.calibration.provenance import Provenance
from fasa_flex.report import inspection

FREQUENCIES = torch.tensor([1.0, 2 * math.pi / 1234, 2 * math.pi / 56_789], dtype=torch.float64)


def profile_of(table: Tensor, kv_heads: int, frequencies: Tensor | None = FREQUENCIES) -> FasaProfile:
    """A profile of heads with 8 dimensions, the last chunk of which does not turn."""
    layout = RotaryLayout.half_split(8, rotary_dim=6)
    layout.frequencies = frequencies
    provenance = Provenance("a model", "llama", "0" * 64, kv_heads, 10, 5, 20, ("a", "b"), {"torch": "2.13"})
    return FasaProfile(table, layout, provenance)


@pytest.fixture
def one() -> FasaProfile:
    """Two layers, two heads: the chunks {0, 1} and {0, 2}, then {0, 1} and {0, 1}."""
    table = [[[0.8, 0.6, 0.1, 0.1], [0.9, 0.1, 0.7, 0.1]], [[0.5, 0.4, 0.1, 0.2], [0.5, 0.4, 0.1, 0.2]]]
    return profile_of(torch.tensor(table), kv_heads=2)


@pytest.fixture
def other() -> FasaProfile:
    """As ``one``, with {0, 1} and {2, 3} in the first layer and {2, 3} twice in the second."""
    table = [[[0.8, 0.6, 0.1, 0.1], [0.1, 0.1, 0.7, 0.8]], [[0.1, 0.2, 0.5, 0.4], [0.1, 0.2, 0.5, 0.4]]]
    return profile_of(torch.tensor(table), kv_heads=2)


def test_dominance_is_a_share_of_heads(one: FasaProfile) -> None:
    assert inspection.dominance(one, 2).tolist() == [1.0, 0.75, 0.25, 0.0]
    assert inspection.is_dominant(one, 2)[0].tolist() == [[True, True, False, False], [True, False, True, False]]


def test_strength_is_that_of_the_heads_chunks(one: FasaProfile) -> None:
    kept, whole = inspection.strength(one, 2)
    torch.testing.assert_close(kept, torch.tensor([[0.7, 0.8], [0.45, 0.45]]))
    torch.testing.assert_close(whole, torch.tensor([[0.4, 0.45], [0.3, 0.3]]))


def test_a_group_is_averaged_for_its_kv_head(one: FasaProfile) -> None:
    grouped = profile_of(one.agreement, kv_heads=1)
    assert inspection.is_dominant(grouped, 2).tolist()[0] == [[True, False, True, False]]
    torch.testing.assert_close(inspection.strength(grouped, 2)[0], torch.tensor([[0.625], [0.45]]))
    torch.testing.assert_close(inspection.strength(grouped, 2, "query_head")[0], inspection.strength(one, 2)[0])


def test_overlap_counts_common_chunks_head_by_head(one: FasaProfile, other: FasaProfile) -> None:
    shared = inspection.overlap([one, other], 2)
    assert shared.shape == (2, 2, 2)
    assert shared[0, 1].tolist() == [0.75, 0.0]
    assert torch.equal(shared[0, 1], shared[1, 0])
    assert (shared[0, 0] == 1).all()


def test_profiles_of_different_shapes_are_refused(one: FasaProfile) -> None:
    for differing in (profile_of(one.agreement[:1], kv_heads=2), profile_of(one.agreement, kv_heads=1)):
        with pytest.raises(ValueError, match=r"differ in shape: 2 layers .* 2 key/value heads .*compare profiles"):
            inspection.overlap([one, differing], 2)
        with pytest.raises(ValueError, match="differ in shape"):
            inspection.report(["a", "b"], [one, differing], 2)


def test_periods_are_in_tokens(one: FasaProfile) -> None:
    assert [inspection.period(one, chunk) for chunk in range(4)] == ["6", "1.2k", "57k", "∞"]
    named = profile_of(one.agreement, 2, frequencies=None)
    assert [inspection.period(named, chunk) for chunk in (0, 3)] == ["?", "∞"]


def test_a_report_says_what_the_profile_holds(one: FasaProfile) -> None:
    lines = inspection.report(["mine"], [one], 2).splitlines()
    assert lines[0] == "mine: a model (llama)"
    assert "2 layers, 2 query heads, 2 key/value heads, 4 chunks, 3 of which rotate" in lines
    assert "agreement on the top 10 keys, over 20 queries: 2 samples, at most 5 decode steps each" in lines
    assert f"calibrated with torch 2.13; fingerprint {one.fingerprint[:12]}" in lines
    assert "| 0 | 0 | 0-1 | 0.700 | 0.400 |" in lines
    assert "| 0 | 1 | 0 2 | 0.800 | 0.450 |" in lines
    assert "| all | all | | 0.600 | 0.363 |" in lines
    ranked = [line for line in lines if line.endswith("% |")]
    assert ranked == ["| 0 | 6 | 100% |", "| 1 | 1.2k | 75% |", "| 2 | 57k | 25% |"]
    assert not any("in common" in line for line in lines)


def test_a_report_of_several_compares_them(one: FasaProfile, other: FasaProfile) -> None:
    lines = inspection.report(["mine", "yours", "again"], [one, other, one], 2).splitlines()
    assert "Dominant chunks in common, as a share of 2 (random sets: 0.50):" in lines
    assert "| layer | 1 and 2 | 1 and 3 | 2 and 3 |" in lines
    assert "| 0 | 0.75 | 1.00 | 0.75 |" in lines
    assert "| all | 0.38 | 1.00 | 0.38 |" in lines


def test_too_many_chunks_are_refused(one: FasaProfile) -> None:
    with pytest.raises(ValueError, match=r"n_tip must lie in 1\.\.4"):
        inspection.report(["mine"], [one], 5)


def test_n_tip_is_that_of_the_config(one: FasaProfile) -> None:
    assert inspection.default_n_tip(one) == 2


# Several criteria.


@pytest.fixture
def two(one: FasaProfile) -> FasaProfile:
    """As ``one``, but variance chooses {1, 2} and {0, 2} in the first layer and {2, 3} twice in the second."""
    variance = torch.tensor([[[1.0, 8, 9, 1], [6, 1, 3, 1]], [[1, 2, 7, 6], [1, 2, 7, 6]]])
    covariance = torch.diag_embed(variance)
    covariance[1, 0, 2, 3] = covariance[1, 0, 3, 2] = -6  # of 7 and 6 little is left: {1, 0} say more
    return FasaProfile(one.agreement, one.layout, one.provenance, variance=variance, covariance=covariance)


def test_criteria_have_chunks_in_common(two: FasaProfile) -> None:
    assert inspection.choosing(two) == ("agreement", "variance", "explained_variance")
    common = inspection.criteria_in_common(two, 2)
    assert common.shape == (3, 3, 2)
    assert common[0, 1].tolist() == [0.75, 0.0]
    assert common[1, 2].tolist() == [1.0, 0.5]
    assert (common.diagonal() == 1).all()
    assert inspection.choosing(two, "query_head") == ("agreement", "variance")
    assert inspection.criteria_in_common(two, 2, "query_head").shape == (2, 2, 2)


def test_a_layer_without_rope_is_named_and_has_the_place_of_random_sets(two: FasaProfile) -> None:
    two.layout.unrotated_layers = (1,)
    assert inspection.place(two, 2, criterion="agreement").tolist() == pytest.approx([1 / 4, 1 / 2])
    assert "3 of which rotate, none in layers 1\n" in inspection.report(["a"], [two], 2)


def test_places_go_by_frequency_and_what_does_not_turn_is_slowest(two: FasaProfile) -> None:
    """Four chunks, at 0, 1/3, 2/3 and 1, in whatever order the layout has them."""
    assert inspection.place(two, 2, criterion="variance").tolist() == pytest.approx([5 / 12, 5 / 6])
    assert inspection.place(two, 2, criterion="agreement").tolist() == pytest.approx([1 / 4, 1 / 6])
    two.layout.frequencies = FREQUENCIES.flip(0)  # chunk 2 is the fastest now, then 1, then 0
    assert inspection.place(two, 2, criterion="variance").tolist() == pytest.approx([1 / 4, 1 / 2])
    two.layout.frequencies = None
    assert inspection.place(two, 2, criterion="variance").tolist() == pytest.approx([5 / 12, 5 / 6])


def test_a_report_shows_the_criteria_side_by_side(two: FasaProfile, one: FasaProfile) -> None:
    lines = inspection.report(["mine"], [two], 2).splitlines()
    title = "The 2 dominant chunks of each key/value head by variance, their mean variance over keys and that of all 4:"
    assert title in lines
    assert "| 0 | 0 | 1-2 | 8.500 | 4.750 |" in lines
    assert (
        "| layer | agreement and variance | agreement and explained variance | variance and explained variance "
        "| place by agreement | place by variance | place by explained variance |"
    ) in lines
    assert "| 0 | 0.75 | 0.75 | 1.00 | 0.25 | 0.42 | 0.42 |" in lines
    by_agreement = inspection.report(["mine"], [two], 2, criterion="agreement").splitlines()
    assert "| 0 | 0 | 0-1 | 0.700 | 0.400 |" in by_agreement
    alone = inspection.report(["mine"], [one], 2)
    assert "side by side" not in alone
    with pytest.raises(ValueError, match="calibrate again"):
        inspection.report(["mine"], [one], 2, criterion="variance")
