"""Compile Inductor's binary search for an NVIDIA GPU that need not be there, in a kernel with two rows to a program.

python tests/compile_search.py apart       # each row's wanted numbers differ: it compiles
python tests/compile_search.py alike       # all rows want the same numbers: it does not, in torch 2.11 to 2.13
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from compile_kernels import compiles
from torch._inductor.runtime import triton_helpers


@triton.jit
def search(counts: tl.tensor, slots: tl.tensor, APART: tl.constexpr) -> None:
    """Where the running counts of two rows of 100 reach 1 to 8."""
    row, wanted = tl.arange(0, 2)[:, None], tl.arange(1, 9)[None]
    if APART:
        wanted = tl.minimum(wanted, tl.load(counts + 100 * row + 99))
    first = 100 * row
    at = triton_helpers.bucketize_binary_search(wanted, counts, 100, 200, 1, first, tl.int64, False, None, None, None)
    tl.store(slots + 8 * row + tl.arange(0, 8)[None], at)


if __name__ == "__main__":
    compiles(search, APART=sys.argv[1] == "apart")
