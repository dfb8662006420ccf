"""Check of the shapes of queries and keys."""

from __future__ import annotations

from torch import Tensor


def check_heads(query: Tensor, key: Tensor) -> None:
    """Refuse queries and keys whose batch, heads, lengths or dimensions do not fit each other.

    Args:
        query: should be [B, Hq, Q, D].
        key: should be [B, Hkv, T, D], B > 0, Hq a multiple of Hkv, 1 <= Q <= T.

    Raises:
        ValueError: the shapes are others; the message names both.
    """
    fits = (
        query.dim() == 4
        and key.dim() == 4
        and query.shape[0] == key.shape[0] > 0
        and query.shape[3] == key.shape[3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and 0 < query.shape[2] <= key.shape[2]
    )
    if not fits:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit; "
            "expected [B, Hq, Q, D] and [B, Hkv, T, D] with at least one row, Hq a multiple of Hkv and 1 <= Q <= T."
        )
