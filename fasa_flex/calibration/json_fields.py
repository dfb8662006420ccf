"""Checked reading of a JSON description's fields: an error names the field and its fault."""

from __future__ import annotations

from typing import Any

_KINDS = {dict: "a table of names", list: "a list", str: "a text", int: "a whole number", type(None): "null"}


def field(fields: dict[str, Any], name: str, *kinds: type) -> Any:
    """The field ``name``, of one of the types ``kinds``.

    Raises:
        ValueError: the field is missing or of another type.
    """
    if name not in fields:
        raise ValueError(f"{name} is missing")
    if not isinstance(fields[name], kinds):
        raise ValueError(f"{name} must be {' or '.join(_KINDS[kind] for kind in kinds)}, got {fields[name]!r}")
    return fields[name]


def check_names(what: str, fields: dict[str, Any], known: set[str]) -> None:
    """Refuse unknown fields.

    Raises:
        ValueError: with the first of them in alphabetical order.
    """
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{what} has a field {unknown[0]!r} that this version does not know")
