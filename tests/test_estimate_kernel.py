"""The kernel of the prefill's estimate in Triton's interpreter, against the PyTorch operations that define it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from test_prefill_by_blocks import Case

from fasa_flex.core.softmax import Softmax
from fasa_flex.prefill.estimators import Blocks, attention_mass

pytest.importorskip("triton")
launches = import_module("fasa_flex.backends.triton.blocks")

CASES = {
    "two groups": Case(),
    "a group of eight": Case((450,), 450, heads=16, kv_heads=2),
    "no group": Case((300,), 300, heads=2),
    "padded rows": Case((600, 333), 600),
    "a second turn": Case((700, 300), 130),
    "a few tokens": Case((700,), 5),
    "a cap": Case((450, 130), 450, softcap=2.0),
    "several tiles of keys": Case((4700,), 300, heads=2, kv_heads=1),
}


def both(blocks: Blocks, size: int, by_head: bool, strongest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = blocks.mean_queries(size), blocks.mean_keys(size)
    softmax, first = blocks.softmax, blocks.grid.first
    by_kernel = launches.mass_by_kernel(query, key, first, softmax.scaling, softmax.softcap, by_head, strongest)
    return by_kernel, attention_mass(blocks, query, key, by_head, strongest)


@pytest.mark.parametrize("strongest", [False, True], ids=["mean", "strongest"])
@pytest.mark.parametrize("by_head", [False, True], ids=["group", "by head"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_estimates_as_the_operations_do(case: Case, by_head: bool, strongest: bool) -> None:
    blocks, _, _ = case.make()
    found, wanted = both(blocks, 32, by_head, strongest)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 64, 128])
def test_any_number_of_representatives(size: int) -> None:
    blocks, _, _ = Case((500,), 500, heads=4, kv_heads=2).make()
    found, wanted = both(blocks, size, False, False)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_queries_of_another_dtype_than_the_keys() -> None:
    blocks, _, _ = Case((300,), 300).make()
    query, key = blocks.mean_queries(32), blocks.mean_keys(32).bfloat16()
    found = launches.mass_by_kernel(query, key, blocks.grid.first, 0.25, None, False, False)
    wanted = attention_mass(replace(blocks, softmax=Softmax(0.25)), query, key.float())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    blocks, _, _ = Case((300,), 300).make()
    found, wanted = both(replace(blocks, softmax=Softmax(300.0)), 32, False, False)
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
