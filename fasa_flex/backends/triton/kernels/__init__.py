"""Triton kernels of a decode step (cache writes, completion state, TIP, selection, FAC, dense layers) and of a prefill.

With the former kernels Inductor took 2.7 to 6.6 times as long for a step on an H100 (evals/results/bench_op_cuda.json).
The kernels of a step need no synchronisation with the host and can be captured in a CUDA graph; the largest temporary
is an integer for each key. `fasa_flex.backends.triton.decode` and `fasa_flex.backends.triton.dense` are their
operators, and `fasa_flex.backends.triton.blocks` launches the estimate of a prefill by blocks.
"""

from fasa_flex.backends.triton.kernels.attention import attend_part, attend_rows, merge_parts
from fasa_flex.backends.triton.kernels.blocks import estimate_blocks
from fasa_flex.backends.triton.kernels.completion import cover_rows
from fasa_flex.backends.triton.kernels.launching import (
    block_that_fits,
    fitting,
    on_their_device,
    overlapping,
    parts_of,
    power_of_two,
)
from fasa_flex.backends.triton.kernels.orders import BINS
from fasa_flex.backends.triton.kernels.rows import fetch_rows, find_rows
from fasa_flex.backends.triton.kernels.scoring import score_keys, sum_keys
from fasa_flex.backends.triton.kernels.selection import list_keys, select_keys
from fasa_flex.backends.triton.kernels.writing import write_states

__all__ = [
    "BINS",
    "attend_part",
    "attend_rows",
    "block_that_fits",
    "cover_rows",
    "estimate_blocks",
    "fetch_rows",
    "find_rows",
    "fitting",
    "list_keys",
    "merge_parts",
    "on_their_device",
    "overlapping",
    "parts_of",
    "power_of_two",
    "score_keys",
    "select_keys",
    "sum_keys",
    "write_states",
]
