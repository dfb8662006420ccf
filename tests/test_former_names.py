"""Modules stay importable by the names that they had before they moved into sub-packages."""

from __future__ import annotations

from importlib import import_module

import pytest

from fasa_flex.former_names import FORMER, current_name

NEED_TRITON = ("kernels", "covering", "decode", "dense", "ranked", "writing")


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_the_module_of_now(name: str) -> None:
    if name.split(".")[0] in NEED_TRITON:
        pytest.importorskip("triton")
    if name.endswith(("plots", "drawing")):
        pytest.importorskip("matplotlib")
    assert import_module(f"fasa_flex.{name}") is import_module(f"fasa_flex.{FORMER[name]}")


def test_a_package_of_a_former_name_has_what_the_module_had() -> None:
    assert import_module("fasa_flex.calibration").calibrate is import_module("fasa_flex").calibrate
    with pytest.raises(ImportError, match="nothing"):
        exec("from fasa_flex.calibration import nothing")


def test_modules_of_a_package_that_moved_move_with_it() -> None:
    assert current_name("fasa_flex.kernels.scoring") == "fasa_flex.backends.triton.kernels.scoring"
    assert current_name("fasa_flex.kernels.covering") == "fasa_flex.backends.triton.kernels.completion"


def test_names_that_never_were_are_not_found() -> None:
    assert current_name("fasa_flex.nothing") is None
    assert current_name("transformers.seam") is None
    with pytest.raises(ModuleNotFoundError, match=r"fasa_flex\.nothing"):
        import_module("fasa_flex.nothing")
