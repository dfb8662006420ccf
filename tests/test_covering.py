"""The completion's state by one kernel, interpreted, against what PyTorch's operators make of each row."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from cases import generator
from torch import Tensor

from fasa_flex.backends.triton import dispatch  # noqa: F401 - registers its kernel
from fasa_flex.core.budget import SINKS
from fasa_flex.core.completion import BLOCK, CompletionState, cover_on

pytest.importorskip("triton")
cover_by_kernel = import_module("fasa_flex.backends.triton.completion").cover_by_kernel

BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 12, 10


def drawn(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rows = torch.randn(BATCH, HEADS, length, DIM + VALUE_DIM, generator=generator(1)) + 0.5
    return rows[..., :DIM].to(dtype), rows[..., DIM:].to(dtype)


class Twins:
    """Two states that follow the same cache, one by the kernel."""

    def __init__(self, key: Tensor, value: Tensor, first_order: bool = True) -> None:
        self.key, self.value = key, value
        self.plain, self.ours = (CompletionState.empty(key, value, first_order) for _ in range(2))

    def advance(self, end: int, written: int, valid: Tensor | None = None, room: int = 0) -> None:
        """After a forward that ends at slot ``end``, in a buffer of so many free slots more."""
        held = torch.arange(end + room) < end
        valid = held[None] if valid is None else valid[:, : end + room] & held
        key, value = (states[:, :, : end + room] for states in (self.key, self.value))
        call = (key, value, valid, valid.cumsum(-1), written)
        self.plain.advance(*call)
        cover_by_kernel(*self.ours.tensors, *call, BLOCK, SINKS)
        for ours, plain in zip(self.ours.tensors, self.plain.tensors, strict=True):
            torch.testing.assert_close(ours, plain, atol=2e-4, rtol=2e-4 if plain.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("room", [0, 37])
def test_a_prompt_and_its_answer_are_covered(first_order: bool, room: int) -> None:
    twins = Twins(*drawn(330), first_order)
    for end, written in [(70, 70), (71, 1), (127, 56), (128, 1), (129, 1), (192, 63), (290, 98)]:
        twins.advance(end, written, room=room)
    assert twins.ours.covered.unique().tolist() == [256]


def test_states_of_half_precision_are_summed_in_float32() -> None:
    """Of bfloat16 the interpreter knows no products; evals/bench/check_cuda.py has it."""
    twins = Twins(*drawn(200, torch.float16))
    twins.advance(200, 200)
    assert twins.ours.covariance.dtype == torch.float16


def test_keys_and_values_may_differ_in_dtype() -> None:
    key, value = drawn(140)
    Twins(key, value.to(torch.float16)).advance(140, 140)


def test_rows_count_their_own_valid_tokens() -> None:
    """One padded on the left, one with holes; their blocks are full at different steps."""
    valid = torch.rand(BATCH, 400, generator=generator(2)) > 0.3
    valid[0], valid[0, :90] = True, False
    key, value = drawn(400)
    key[~valid[:, None].expand(-1, HEADS, -1)] = torch.nan  # padding never enters
    twins, covered = Twins(key, value), set()
    for end, written in [(200, 200), *((end, 7) for end in range(207, 300, 7)), (399, 101)]:
        twins.advance(end, written, valid)
        covered.add(tuple(twins.ours.covered[:, 0].tolist()))
    assert len({row[0] for row in covered}) > 1
    assert any(row[0] != row[1] for row in covered)


def test_a_cropped_cache_is_covered_anew() -> None:
    """Cropped below what is covered, and below the first block, and filled with other tokens."""
    twins = Twins(*drawn(300))
    twins.advance(200, 200)
    twins.key[:, :, 100:] *= 2
    twins.advance(130, 30)
    assert twins.ours.covered.unique().tolist() == [128]
    twins.advance(40, 10)
    assert not any(bool(held.any()) for held in twins.ours.tensors[:4])
    twins.advance(64, 24)
    assert twins.ours.covered.unique().tolist() == [64]


def test_nothing_is_written_between_two_blocks() -> None:
    twins = Twins(*drawn(200))
    twins.advance(130, 130)
    before = [held.clone() for held in twins.ours.tensors]
    twins.key.fill_(torch.nan)
    twins.advance(150, 20)
    assert all(torch.equal(held, former) for held, former in zip(twins.ours.tensors, before, strict=True))


def test_wide_heads_are_covered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_flex.backends.triton.completion.MOST_PRODUCTS", 256)
    rows = torch.randn(1, 1, 150, 40 + VALUE_DIM, generator=generator(3))
    twins = Twins(rows[..., :40], rows[..., 40:])
    twins.advance(70, 70)
    twins.advance(150, 80)


def test_a_long_prompt_is_covered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(*drawn(300))
    monkeypatch.setattr("fasa_flex.core.completion.rows_that_fit", lambda row_bytes: 70)
    twins.advance(300, 300)


@pytest.mark.parametrize(("pinned", "most"), [(True, 70), (False, 70), (True, 69)])
def test_a_gpu_covers_by_the_kernel_what_it_can_read(pinned: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_flex.core.completion.MOST_BY_KERNEL", most)
    called: list[Any] = []
    monkeypatch.setattr("fasa_flex.backends.triton.completion.cover_by_kernel", lambda *call: called.append(call))
    monkeypatch.setitem(cover_on, "cpu", cover_on["cuda"])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    key, value = drawn(70)
    state = CompletionState.empty(key, value, True)
    valid = torch.ones(1, 70, dtype=torch.bool)
    state.advance(key, value, valid, valid.cumsum(-1), 70)
    assert len(called) == int(pinned and most == 70)
    assert bool(state.covered.any()) == (not called)
