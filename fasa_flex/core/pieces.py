"""Size of the pieces in which code computes large temporaries."""

from __future__ import annotations

_BYTES = 1 << 26


def rows_that_fit(row_bytes: int) -> int:
    """Number of rows of ``row_bytes`` bytes in a temporary of 64 MiB; at least 1."""
    return max(1, _BYTES // max(1, row_bytes))
