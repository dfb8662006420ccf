"""The checks of a GPU: the parts that several GPUs run."""

from __future__ import annotations

import argparse

import pytest

from evals.bench import check_cuda


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_all_checks_once(parts: int) -> None:
    every = check_cuda.keys(False, True)
    found = [key for number in range(parts) for key in every[check_cuda.of_part(f"{number + 1}/{parts}")]]
    assert len(found) == len(every)
    assert all(key in found for key in every)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", ""])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="pass K/N"):
        check_cuda.of_part(text)
