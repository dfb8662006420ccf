"""The pictures show the numbers they were given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fasa_flex import FasaProfile, calibrate
from fasa_flex.plots import agreement_heatmap, score_curves


@pytest.fixture
def profile(llama: PreTrainedModel, ids: Callable[..., torch.Tensor]) -> FasaProfile:
    return calibrate(llama, [ids(80)], top_k=16, max_new_tokens=4, progress=False)


def test_heatmap_is_the_table_with_the_dominant_chunks_on_it(profile: FasaProfile, tmp_path: Path) -> None:
    figure = agreement_heatmap(profile, n_tip=3)
    axes = figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), profile.agreement.flatten(0, 1))
    dots = axes.collections[0].get_offsets()
    layers, kv_heads = profile.agreement.shape[0], profile.provenance.kv_heads
    assert len(dots) == layers * kv_heads * 3
    assert sorted({int(x) for x, _ in dots if x >= 0}) == sorted(set(profile.dominant(3).flatten().tolist()))
    first = 2 * math.pi / float(profile.layout.frequencies[0])
    assert axes.get_xticklabels()[0].get_text() == f"{first:.0f}"
    figure.savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


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
