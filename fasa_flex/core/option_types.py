"""Allowed values of the options, in a module without torch so that the command line can list them quickly."""

from __future__ import annotations

from typing import Literal

Sharing = Literal["kv_head", "query_head"]
GroupReduce = Literal["softmax", "softmax_exact", "max", "mean", "none"]
Completion = Literal["first_order", "mean", "none"]
Backend = Literal["auto", "fastest", "flex", "gather", "triton", "reference"]
Prefill = Literal["dense", "sparse", "blocks"]
PrefillCompletion = Literal["mean", "none"]
PackedDtype = Literal["bfloat16", "float16", "int8", "int4"]
Criterion = Literal["agreement", "variance", "explained_variance", "weighted_variance"]
"""How dominant chunks are chosen.

``"agreement"``: by contextual agreement, as in the paper. ``"variance"``: by the variance over keys of the chunk's part
of the logits. ``"explained_variance"``: greedily, at each step the chunk that explains most of the logits' residual
variance, correlations included. ``"weighted_variance"``: the same chunks, each with a least-squares weight.
"""
