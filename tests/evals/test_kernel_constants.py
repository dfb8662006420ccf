"""The benchmark of the kernels sets only constants that they have."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from evals.bench import kernels


@pytest.mark.parametrize("text", ["SCORE_BLOCKS=128", "SCORE_BLOCK=many", "SCORE_BLOCK"])
def test_an_unknown_constant_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", "--set", text])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "sets no constant to a number; pass NAME=NUMBER." in capsys.readouterr().err


def test_the_script_for_a_gpu_sets_constants_that_exist() -> None:
    script = (Path(kernels.__file__).parent / "gpu.sh").read_text()
    names = {name for text in re.findall(r"--set ([A-Z_=,0-9]+)", script) for name in re.findall(r"([A-Z_]+)=", text)}
    assert len(names) > 10
    assert {name for name in names if not any(hasattr(module, name) for module in kernels.MODULES)} == set()
