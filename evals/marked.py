"""Writes tables between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fasa_flex.saving import replace_text


def block(text: str, name: str) -> str | None:
    """The text between the markers of a table; None if there are no markers."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
    return found and found[1].removesuffix("\n")


def fill(readme: Path, tables: Mapping[str, Callable[[], str]]) -> None:
    """Write tables between their markers.

    Raises:
        SystemExit: a table without markers.
    """
    text = readme.read_text(encoding="utf-8")
    for name, made in tables.items():
        if block(text, name) is None:
            raise SystemExit(f"{readme} has no place for the table {name}; add <!-- {name} --> and <!-- /{name} -->.")
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        behind = rest[rest.index(f"<!-- /{name} -->") :]
        text = f"{before}<!-- {name} -->\n{made()}\n{behind}"
    replace_text(readme, text)
