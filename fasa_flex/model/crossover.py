"""Measured cache sizes from which a decode step is faster with sparse than with dense attention."""

from __future__ import annotations

import torch
from torch import Tensor

KV_BYTES = {
    ("cuda", False): 170_000_000,
    ("cuda", True): 33_000_000,
    ("cpu", False): 30_000_000,
    ("cpu", True): 30_000_000,
}
"""Bytes of keys and values in one layer, over the batch, from which a sparse decode step is faster than a dense one.

The key is the device type and whether dense attention would run `fasa_flex.backends.dense`. Below this size the fixed
cost of sparse attention dominates. Measured on an H100 (bfloat16, shape of Llama-3.1-8B, CUDA-graph replays;
bench_step_cuda.json in evals/results), a sparse step is as fast as the fastest dense step at 5k to 8k tokens for batch
1 (22 to 33 MB) and at 4k to 5k tokens for batch 8 (136 to 153 MB); the value is a little above the largest of these.
Against `fasa_flex.backends.dense`, which a mask needs, the crossover is between 4k and 32k tokens for batch 1 (17 and
134 MB) and below 4k for batch 8 (first of the file's `repeats`, in which "fastest" ran dense by that module). On two
CPU cores (float32, shape of Llama-3.2-1B) a sparse step is faster from 10k tokens (42 MB) if nothing is compiled, and
from 1k tokens if all is (bench_step_cpu.json); "fastest" compiles attention alone and lies between: 30 MB, 7k tokens.
"""

GROWING_BYTES = {"cuda": 1_500_000_000}
"""The same threshold for eager steps on growing caches, where no CUDA graph hides Python's time, which is longer for
sparse attention. On an H100 a sparse step is as fast as a dense one at 1.1 GB per layer and faster at 1.6 GB
(growing_long_cuda.json in evals/results); there a dense step reads every byte and transformers' growing cache copies
it. Eager steps of a static cache are excluded although Python takes as long: such a step may be the warm-up of a CUDA
graph, which must launch every kernel before the graph is recorded.
"""

BUDGETS = {"cuda": 16, "cpu": 4}
"""Smallest ratio of keys to budget at which sparse may run; none smaller was measured (256 of 4096 and 1024 tokens)."""


def sparse_is_faster(
    query: Tensor, key: Tensor, value: Tensor, most_selected: int, grouped: bool, growing: bool = False
) -> bool:
    """Whether a layer's decode step is faster with sparse attention; depends on shapes alone, so that it compiles.

    Args:
        query: float [B, Hq, 1, D].
        key: float [B, Hkv, T, D]; T counts the slots of a static buffer, all of which dense attention reads.
        value: float [B, Hkv, T, Dv].
        most_selected: number of keys that a query may select from T.
        grouped: whether dense attention would be `fasa_flex.backends.dense.grouped_attention`.
        growing: whether the call is eager on a growing cache.
    """
    kv_bytes, device = (key.numel() + value.numel()) * key.element_size(), query.device.type
    least = max(KV_BYTES.get((device, grouped), 0), GROWING_BYTES.get(device, 0) if growing else 0)
    return kv_bytes >= least and key.shape[2] >= BUDGETS.get(device, 1) * most_selected


def packs_late(device: torch.device) -> bool:
    """Whether growing layers pack keys only at their first sparse step, so that dense steps save the Python time."""
    return device.type in GROWING_BYTES
