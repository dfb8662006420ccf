"""From which size on a decode step's sparse attention is faster than dense attention, as measured."""

from __future__ import annotations

import torch
from torch import Tensor

KV_BYTES = {
    ("cuda", False): 170_000_000,
    ("cuda", True): 33_000_000,
    ("cpu", False): 30_000_000,
    ("cpu", True): 30_000_000,
}
"""Keys and values of one layer, over the batch, from which a decode step is the faster if it is sparse.

By device, and by whether dense attention would be `fasa_flex.backends.dense`'s. Below, a fixed cost decides. On an H100
(bfloat16, Llama-3.1-8B's shape, replayed as a graph; bench_step_cuda.json in evals/results) the crossover of a whole
step with the best dense one is 5k to 8k tokens at batch 1, 22 to 33 MB, and 4k to 5k at batch 8, 136 to 153 MB: a
little more than the latest of them, so that sparse is not the slower. With ours, which a mask needs, it is between 4k
and 32k tokens at batch 1, 17 and 134 MB, and at batch 8 below 4k (the first of its `repeats`, where "fastest" was dense
by ours). On two CPU cores (float32, Llama-3.2-1B's shape) a step is the faster from 10k tokens on where nothing is
compiled, 42 MB, and from 1k where all is (bench_step_cpu.json); compiling attention alone, as "fastest" does, is
between the two, and 30 MB are 7k tokens.
"""

GROWING_BYTES = {"cuda": 1_500_000_000}
"""And where a cache grows, so that no graph holds the step: a GPU then waits for Python, which takes longer for sparse
attention than for dense. On an H100 sparse attention is level with dense at 1.1 GB a layer and the faster at 1.6
(growing_long_cuda.json in evals/results); a dense step reads each byte there and transformers' growing cache copies it.
An uncompiled step of a static cache, as slow for Python, is not one of these: it may be the warm-up of a graph, which
is to have launched every kernel before the graph is recorded.
"""

BUDGETS = {"cuda": 16, "cpu": 4}
"""And at least so many times the budget, the least that was measured: 256 of 4096 and of 1024 tokens at batch 8."""


def sparse_is_faster(
    query: Tensor, key: Tensor, value: Tensor, most_selected: int, grouped: bool, growing: bool = False
) -> bool:
    """Whether the rule says so for one layer's decode step; shapes alone decide, so it compiles.

    Args:
        query: float [B, Hq, 1, D].
        key: float [B, Hkv, T, D]; T counts the slots of a static buffer, all of which dense attention reads.
        value: float [B, Hkv, T, Dv].
        most_selected: the budget among T keys.
        grouped: whether dense attention would be `fasa_flex.backends.dense.grouped_attention`.
        growing: whether the call is eager and of a growing cache.
    """
    held, device = (key.numel() + value.numel()) * key.element_size(), query.device.type
    least = max(KV_BYTES.get((device, grouped), 0), GROWING_BYTES.get(device, 0) if growing else 0)
    return held >= least and key.shape[2] >= BUDGETS.get(device, 1) * most_selected


def packs_late(device: torch.device) -> bool:
    """Whether a growing layer's keys had better stay unpacked until a step is sparse: dense ones wait for Python."""
    return device.type in GROWING_BYTES
