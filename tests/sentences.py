"""Errors of the library are one sentence: what is wrong, with the value, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def assert_sentence(said: str) -> None:
    """One line that says what to do, behind "; " or ": " or as what must be, and shows no object, type or raw error."""
    assert "\n" not in said, said
    assert said == said.strip(), said
    assert re.search(r"[;:] \S|\bmust\b|\bexpected\b", said), f"what is to be done? {said}"
    assert not re.search(r" object at 0x|<class |Traceback|\.\.$", said), said


@contextmanager
def raises_sentence(
    expected: type[Exception] | tuple[type[Exception], ...], match: str
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """`pytest.raises` for an error that is a sentence."""
    with pytest.raises(expected, match=match) as error:
        yield error
    assert_sentence(str(error.value))
