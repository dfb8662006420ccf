"""Full names of the package in prose, such as `fasa_flex.core.scoring.Scorer`, are of things that exist."""

from __future__ import annotations

import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"`(fasa_flex(?:\.\w+)+)`")
TEXTS = [path for folder in ("fasa_flex", "tests", "evals") for path in (ROOT / folder).rglob("*.py")]
TEXTS += [path for path in (*ROOT.glob("*.md"), *(ROOT / "evals").rglob("*.md")) if path.name != "CHANGELOG.md"]


def exists(name: str) -> bool:
    """Whether a name is of a module, of a member or of an annotated attribute."""
    owner, _, last = name.rpartition(".")
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ModuleNotFoundError):
        try:
            return last in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
        except (AttributeError, ModuleNotFoundError):
            return False
    return True


def test_names_in_prose_exist() -> None:
    names = {name for path in TEXTS for name in NAME.findall(path.read_text(encoding="utf-8"))}
    assert len(names) > 50
    if find_spec("triton") is None:  # it is installed with CUDA builds of torch only
        names = {name for name in names if "triton" not in name}
    assert not sorted(name for name in names if not exists(name))


@pytest.mark.parametrize("name", ["fasa_flex.core.scoring.Scorers", "fasa_flex.cores", "fasa_flex.core.scoring.a.b"])
def test_a_wrong_name_is_found(name: str) -> None:
    assert not exists(name)
