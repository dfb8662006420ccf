"""The pictures show the numbers they were given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fasa_flex import FasaProfile, RotaryLayout, calibrate
from fasa_flex.report.inspection import dominance, is_dominant, overlap
from fasa_flex.report.plots import inspection, score_curves


@pytest.fixture
def profile(llama: PreTrainedModel, ids: Callable[..., torch.Tensor]) -> FasaProfile:
    return calibrate(llama, [ids(80)], top_k=16, max_new_tokens=4, progress=False)


def test_heatmap_is_the_table_with_the_dominant_chunks_on_it(profile: FasaProfile, tmp_path: Path) -> None:
    figure = inspection(["one"], [profile], n_tip=3, criterion="agreement")
    axes = figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), profile.agreement.flatten(0, 1))
    dots = axes.collections[0].get_offsets()
    layers, kv_heads = profile.agreement.shape[0], profile.provenance.kv_heads
    assert len(dots) == layers * kv_heads * 3
    assert sorted({int(x) for x, _ in dots if x >= 0}) == sorted(
        set(profile.dominant(3, criterion="agreement").flatten().tolist())
    )
    first = 2 * math.pi / float(profile.layout.frequencies[0])
    assert axes.get_xticklabels()[0].get_text() == f"{first:.0f}"
    figure.savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_a_criterion_of_variance_is_drawn_as_shares_of_a_head(profile: FasaProfile) -> None:
    axes = inspection(["one"], [profile], n_tip=3).axes[0]
    assert profile.variance is not None
    shares = torch.from_numpy(np.asarray(axes.images[0].get_array()))
    expected = profile.variance.flatten(0, 1)
    torch.testing.assert_close(shares, expected / expected.sum(1, keepdim=True))
    assert {int(x) for x, _ in axes.collections[0].get_offsets()} == set(profile.dominant(3).flatten().tolist())


@pytest.fixture
def large(profile: FasaProfile) -> FasaProfile:
    """32 layers of 32 query heads, 8 key/value heads and 64 chunks."""
    table = torch.rand(32, 32, 64, generator=torch.Generator().manual_seed(0))
    provenance = dataclasses.replace(profile.provenance, kv_heads=8)
    return FasaProfile(table, RotaryLayout.half_split(128), provenance)


def test_a_large_heatmap_has_a_row_for_each_layer(large: FasaProfile) -> None:
    axes = inspection(["large"], [large], n_tip=32).axes[0]
    assert np.array_equal(axes.images[0].get_array(), large.agreement.mean(1))
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer {layer}" for layer in range(32)]
    drawn = {(int(layer), int(chunk)) for chunk, layer in axes.collections[0].get_offsets()}
    often = is_dominant(large, 32).float().mean(1) >= 0.5
    assert drawn == {(int(layer), int(chunk)) for layer, chunk in often.nonzero()}
    assert axes.get_xlabel() == "chunk"  # the layout was named, so no period is known


def test_chunks_of_query_heads_are_marked_on_their_own_rows(profile: FasaProfile) -> None:
    axes = inspection(["one"], [profile], n_tip=1, per="query_head").axes[0]
    drawn = {(int(row), int(chunk)) for chunk, row in axes.collections[0].get_offsets()}
    best = profile.dominant(1, "query_head").flatten().tolist()
    assert drawn == set(enumerate(best))


def test_inspection_shows_maps_dominance_and_overlap(
    profile: FasaProfile, llama: PreTrainedModel, ids: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    other = calibrate(llama, [ids(80, seed=1)], top_k=16, max_new_tokens=4, progress=False)
    figure = inspection(["one", "other"], [profile, other], n_tip=3, criterion="agreement")
    first, second, bars, square = figure.axes[:4]
    assert (first.get_title(), second.get_title()) == ("one", "other")
    assert np.array_equal(second.images[0].get_array(), other.agreement.flatten(0, 1))
    heights = [bar.get_height() for bar in bars.containers[1]]
    assert heights == pytest.approx(dominance(other, 3, criterion="agreement").tolist())
    shared = overlap([profile, other], 3, criterion="agreement").mean(-1)
    assert shared[0, 1] < 1
    assert [text.get_text() for text in square.texts] == [f"{value:.2f}" for value in shared.flatten().tolist()]
    figure.savefig(tmp_path / "both.png")

    alone = inspection(["one"], [profile], n_tip=3)
    assert [axes.get_title() for axes in alone.axes if axes.get_title()] == ["one"]


def test_curves_have_a_panel_a_task_and_a_line_a_method(tmp_path: Path) -> None:
    rows = [
        {"task": task, "metric": "exact_match", "method": method, "budget": budget, "score": score, "stderr": None}
        for task in ("one", "two")
        for method, budget, score in (("dense", None, 0.9), ("FASA", 64, 0.8), ("FASA", 32, 0.7), ("recent", 32, 0.1))
    ]
    figure = score_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    dense = figure.axes[0].lines[0]
    fasa, recent = (bars.lines[0] for bars in figure.axes[0].containers)
    assert list(dense.get_ydata()) == [0.9, 0.9]
    assert list(fasa.get_xdata()) == [32, 64]
    assert list(fasa.get_ydata()) == [0.7, 0.8]
    assert list(recent.get_ydata()) == [0.1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "FASA", "recent"]
    figure.savefig(tmp_path / "curves.png")


def test_every_method_is_drawn() -> None:
    """However many there are, each with a look of its own."""
    rows = [
        {"task": "t", "metric": "acc", "method": f"method {number}", "budget": budget, "score": 0.5, "stderr": None}
        for number in range(11)
        for budget in (32, 64)
    ]
    lines = [line for line in score_curves(rows).axes[0].lines if len(line.get_xdata()) == 2]
    looks = {(line.get_color(), line.get_marker()) for line in lines if line.get_marker() not in ("None", "_")}
    assert len(looks) == 11
