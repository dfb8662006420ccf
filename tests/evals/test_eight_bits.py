"""Weights in eight bits: what goes in comes out again, row by row within half of a level."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.reference_model import eight_bits
from evals.reference_model.recipe import QUICK
from evals.reference_model.train import build_model

REFERENCE = Path(__file__).parents[2] / "evals" / "reference_model"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    model = build_model(QUICK)
    with torch.no_grad():
        model.model.norm.weight.normal_()
        model.model.layers[0].mlp.up_proj.weight[3] = 0.0
        model.model.layers[0].mlp.up_proj.weight[4] *= 1000.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    return folder


def test_no_weight_moves_by_more_than_half_of_its_rows_level(trained: Path, tmp_path: Path) -> None:
    eight_bits.pack(trained, tmp_path / "packed")
    eight_bits.unpack(tmp_path / "packed", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if weight.dim() == 1:
            assert torch.equal(after[name], weight)
        else:
            level = weight.abs().amax(1, keepdim=True) / 127
            assert ((after[name] - weight).abs() <= 0.501 * level).all()
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_an_unpacked_folder_is_an_ordinary_model(trained: Path, tmp_path: Path) -> None:
    eight_bits.pack(trained, tmp_path / "packed")
    eight_bits.unpack(tmp_path / "packed", tmp_path / "again")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (trained, tmp_path / "again")
        )
    assert (after - before).std() < 0.03 * before.std()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.encode('VUTO="NUHAME"') == AutoTokenizer.from_pretrained(REFERENCE).encode('VUTO="NUHAME"')


def test_shards_are_small_and_none_is_left_of_an_earlier_packing(trained: Path, tmp_path: Path) -> None:
    eight_bits.pack(trained, tmp_path, shard_bytes=12_000)
    many = json.loads((tmp_path / eight_bits.INDEX).read_text())["shards"]
    largest = max(tensor.nbytes for tensor in eight_bits.rounded(load_file(trained / "model.safetensors")).values())
    assert len(many) > 2
    assert all(sum(t.nbytes for t in load_file(tmp_path / name).values()) <= max(12_000, largest) for name in many)
    eight_bits.pack(trained, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["eight_bits-1-of-1.safetensors"]


def test_folders_that_are_not_packed_or_not_whole_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not packed"):
        eight_bits.unpack(trained, tmp_path / "again")
    eight_bits.pack(trained, tmp_path / "packed")
    shard = tmp_path / "packed" / "eight_bits-1-of-1.safetensors"
    tensors = load_file(shard)
    tensors.pop("model.norm.weight")
    save_file(tensors, shard)
    with pytest.raises(ValueError, match="pack the model again"):
        eight_bits.unpack(tmp_path / "packed", tmp_path / "again")
