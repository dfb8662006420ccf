"""Softmax: the cap written out, and what counts as plain."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fasa_flex.core.softmax import Softmax


def test_the_cap_bounds_logits_and_keeps_small_ones() -> None:
    logits = torch.tensor([-100.0, -1.0, 0.0, 0.01, 2.0, 100.0])
    capped = Softmax(0.5, softcap=2.0).cap(logits)
    expected = [2 * math.tanh(number / 2) for number in logits.tolist()]
    torch.testing.assert_close(capped, torch.tensor(expected))
    assert Softmax(0.5).cap(logits).equal(logits)


def test_logits_are_scaled_before_they_are_capped() -> None:
    scores = torch.tensor([-3.0, 0.5, 8.0])
    expected = [2 * math.tanh(0.25 * number) for number in scores.tolist()]
    torch.testing.assert_close(Softmax(0.5, softcap=2.0).logits(scores), torch.tensor(expected))
    assert Softmax(0.5).logits(scores).equal(scores / 2)


def test_plain_is_neither_cap_nor_sinks() -> None:
    assert Softmax(1.0).plain
    assert not Softmax(1.0, softcap=3.0).plain
    assert not Softmax(1.0, sinks=torch.zeros(2)).plain
    assert not Softmax(1.0, 3.0, torch.zeros(2)).plain


def test_it_is_itself_and_does_not_change() -> None:
    one, other = Softmax(1.0, sinks=torch.zeros(2)), Softmax(1.0, sinks=torch.zeros(2))
    assert one == one
    assert one != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.scaling = 2.0
