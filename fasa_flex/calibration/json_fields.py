"""Fields of a JSON description that somebody may have edited, read so that an error says what is wrong with which."""

from __future__ import annotations

from typing import Any

_KINDS = {dict: "a table of names", list: "a list", str: "a text", int: "a whole number", type(None): "null"}


def field(fields: dict[str, Any], name: str, *kinds: type) -> Any:
    """A field of one of these kinds.

    Raises:
        ValueError: it is missing or of another kind.
    """
    if name not in fields:
        raise ValueError(f"{name} is missing")
    if not isinstance(fields[name], kinds):
        raise ValueError(f"{name} must be {' or '.join(_KINDS[kind] for kind in kinds)}, got {fields[name]!r}")
    return fields[name]


def check_names(what: str, fields: dict[str, Any], known: set[str]) -> None:
    """Refuse fields that nothing reads.

    Raises:
        ValueError: with the first of them.
    """
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{what} has a field {unknown[0]!r} that this version does not know")
