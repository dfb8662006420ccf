"""The baselines' published settings, as fields of `FasaConfig`."""

from __future__ import annotations

from typing import Any

_PLAIN: dict[str, Any] = {
    "n_tip": 0.25,
    "n_sink": 0,
    "n_recent": 0,
    "group_reduce": "softmax_exact",
    "packed_dtype": None,
    "completion": "none",
}
"""Settings of all baselines, unless a method's own differ: no forced tokens, no rounding, no completion."""


def as_published(method: str, n_fac: int | float) -> dict[str, Any]:
    """Fields of `fasa_flex.FasaConfig` as in a method's paper.

    StreamingLLM forces 8 sinks, or half of the budget if that is less. SparQ forces the latest quarter of the budget,
    as in its paper's evaluation, and completes by the mean value; if the budget is a share, it forces the latest tokens
    of `fasa_flex.core.budget`. vAttention forces as many first and latest tokens as FASA.

    Args:
        method: one of `fasa_flex.baselines.Method`.
        n_fac: the budget, as in `fasa_flex.FasaConfig`.
    """
    count = n_fac if isinstance(n_fac, int) else None
    own: dict[str, dict[str, Any]] = {
        "streaming_llm": {"n_sink": 8 if count is None else min(8, count // 2)},
        "sparq": {"n_recent": None if count is None else count // 4, "completion": "mean"},
        "vattention": {"n_sink": None, "n_recent": None},
    }
    return {**_PLAIN, **own.get(method, {})}
