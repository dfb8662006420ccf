"""How far a decoded token's way through one sparse layer is: a bound that a change may lower, not raise."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from generation import Ids, profile_of
from transformers import DynamicCache, PreTrainedModel

import fasa_flex
from fasa_flex import FasaConfig, enable

CALLS, FILES, CHANGES = 54, 20, 31
"""Python calls into the package, its files that are entered, and changes from file to file."""
ROOT = str(Path(fasa_flex.__file__).parent)


def test_the_path_through_a_sparse_layer_grows_no_longer(llama: PreTrainedModel, ids: Ids) -> None:
    """Of the second sparse layer: the first one makes what the layers of a step have in common."""
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            entered.append((frame.f_code.co_filename, frame.f_code.co_name))

    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), enable(llama, profile_of(llama), FasaConfig(n_fac=16, dense_layers=())) as fasa:
        llama(ids(200, rows=1), past_key_values=cache)
        llama(ids(1, rows=1), past_key_values=cache)
        before = fasa.stats.sparse_queries
        sys.setprofile(note)
        try:
            llama(ids(1, rows=1), past_key_values=cache)
        finally:
            sys.setprofile(None)
        assert fasa.stats.sparse_queries > before
    begins = [place for place, (_, name) in enumerate(entered) if name == "before"]
    layer = entered[begins[1] : begins[2] if len(begins) > 2 else None]
    files = [file for file, _ in layer]
    changes = sum(one != other for one, other in pairwise(files))
    assert "attend" in [name for _, name in layer]
    assert len(layer) <= CALLS
    assert len(set(files)) <= FILES
    assert changes <= CHANGES
