"""Checks attention by blocks on this device: flex against attention in float64 over the same selected blocks.

    python -m evals.bench.check_prefill                  # on CUDA, a minute or two
    python -m evals.bench.check_prefill --device cpu     # by gather: a dry run

Prints a line for each case with its largest error, relative to the largest number of the result; the exit code is 1 if
one is above its dtype's bound. The last case runs the estimate in several pieces and compares it with float64, too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasa_flex.core.scoring import DominantChunks
from fasa_flex.core.softmax import Softmax
from fasa_flex.prefill.attention import block_sparse_attention
from fasa_flex.prefill.estimators import BlockEstimator, Blocks, antidiagonal, oracle, pooled, strided
from fasa_flex.prefill.grid import BLOCK, Grid, take
from fasa_flex.prefill.selection import BlockBudget, BlockLists

BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Rows of ``lengths`` tokens, padded on the left; the last ``queries`` slots are queries (default: all)."""

    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = (2048,)
    queries: int | None = None
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    softcap: float | None = None
    sinks: bool = False
    mass: float | None = None
    estimator: BlockEstimator = pooled
    completes: bool = False

    def blocks(self, device: torch.device) -> tuple[Blocks, Tensor]:
        """The blocks, and the values."""
        batch, longest = len(self.lengths), max(self.lengths)
        q_len, generator = self.queries or longest, torch.Generator(device).manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(batch, *size, self.dim, generator=generator, device=device, dtype=self.dtype)

        pads = longest - torch.tensor(self.lengths, device=device)[:, None]
        number = (torch.arange(longest, device=device) >= pads).cumsum(1)
        grid = Grid.of(number[:, longest - q_len :], number)
        assert grid is not None
        dims = torch.rand(self.kv_heads, self.dim, generator=generator, device=device).argsort(1)[:, : self.dim // 2]
        sinks = torch.randn(self.heads, generator=generator, device=device) if self.sinks else None
        softmax = Softmax(self.dim**-0.5, self.softcap, sinks)
        blocks = Blocks(
            2 * drawn(self.heads, q_len), drawn(self.kv_heads, longest), DominantChunks(dims), grid, softmax
        )
        return blocks, drawn(self.kv_heads, longest)


CASES = {
    **{f"length {n}": Case(lengths=(n,)) for n in (2048, 1000, 1111, 4096, 384)},  # one kernel, dynamic lengths
    "float16": Case(torch.float16),
    "float32": Case(torch.float32),
    "float32, 64 dimensions": Case(torch.float32, dim=64, heads=9, kv_heads=3),
    "256 dimensions": Case(dim=256, heads=4, kv_heads=1),
    "no groups": Case(kv_heads=8),
    "padded rows": Case(lengths=(1500, 700, 129)),
    "a second turn": Case(lengths=(1900, 1000), queries=300),
    "a few tokens": Case(lengths=(1900,), queries=5),
    "a cap": Case(softcap=5.0),
    "sinks": Case(sinks=True),
    "mass": Case(mass=0.8),
    "strided": Case(estimator=strided),
    "antidiagonal": Case(estimator=antidiagonal),
    "oracle": Case(estimator=oracle),
    "8 key/value heads": Case(lengths=(8192,), heads=32, kv_heads=8),
    "completed": Case(completes=True),
    "completed, padded rows": Case(torch.float32, lengths=(1500, 700, 129), completes=True),
    "completed, a cap and sinks": Case(softcap=5.0, sinks=True, completes=True),
}


def expected(blocks: Blocks, value: Tensor, lists: BlockLists, completes: bool = False) -> Tensor:
    """Attention in float64 to the selected blocks, and to the means of others if it ``completes``: [B, Hq, Q, D]."""
    grid, (batch, heads) = blocks.grid, blocks.query.shape[:2]
    picked = torch.zeros(*lists.count.shape, grid.n_keys + 1, dtype=torch.bool, device=value.device)
    used = torch.arange(lists.listed.shape[3], device=value.device) < lists.count[..., None]
    picked.scatter_(3, torch.where(used, lists.listed.long(), grid.n_keys), True)
    picked.scatter_(3, lists.diagonal.long()[:, None, :, None].expand(*lists.count.shape, 1), True)
    picked = picked[..., :-1].repeat_interleave(heads // lists.count.shape[1], 1)
    token = BLOCK * grid.first[:, None] + grid.places
    key, values = (take(states, grid.slots).double() for states in (blocks.key, value))
    causal = torch.arange(key.shape[2], device=value.device) <= token[..., None]
    mean_key, mean_value = (states.unflatten(2, (-1, BLOCK)).mean(3) for states in (key, values))
    earlier = torch.arange(grid.n_keys, device=value.device) < (token // BLOCK)[..., None]
    out = []
    for head in range(heads):  # one at a time: float64 scores are large
        own = head // (heads // key.shape[1])
        logits = blocks.softmax.logits(blocks.query[:, head].double() @ key[:, own].mT)
        rows = (grid.places.clamp(min=0) // BLOCK)[..., None].expand(batch, -1, grid.n_keys)
        own_blocks = picked[:, head].gather(1, rows)
        logits = logits.masked_fill(~(own_blocks.repeat_interleave(BLOCK, 2) & causal), -torch.inf)
        attended = values[:, own]
        if completes:
            more = blocks.softmax.logits(blocks.query[:, head].double() @ mean_key[:, own].mT) + math.log(BLOCK)
            logits = torch.cat([logits, more.masked_fill(own_blocks | ~earlier, -torch.inf)], 2)
            attended = torch.cat([attended, mean_value[:, own]], 1)
        if blocks.softmax.sinks is not None:
            logits = torch.cat([logits, blocks.softmax.sinks[head].double().expand(*logits.shape[:2], 1)], 2)
        weights = logits.softmax(-1)[..., : attended.shape[1]].nan_to_num()
        out.append(torch.where((grid.places >= 0)[..., None], weights @ attended, 0.0))
    return torch.stack(out, 1)


@torch.no_grad()
def error_of(case: Case, device: torch.device) -> float:
    """The largest error of a case, relative to the largest number."""
    blocks, value = case.blocks(device)
    out, lists = block_sparse_attention(
        blocks, value, BlockBudget(0.4, case.mass), case.estimator, completes=case.completes
    )
    wanted = expected(blocks, value, lists, case.completes)
    return float((out.double() - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def estimate_error(device: torch.device) -> float:
    """The largest error of an estimate in several pieces, compiled on CUDA."""
    blocks, _ = replace(CASES["8 key/value heads"], dtype=torch.float32).blocks(device)
    found = pooled(blocks, size=16)
    query, key = (states.double() for states in (blocks.mean_queries(16), blocks.mean_keys(16)))
    logits = query.flatten(3, 4) @ key.flatten(2, 3)[:, :, None].mT * blocks.softmax.scaling
    step = torch.arange(logits.shape[-1], device=device)
    weights = logits.masked_fill(step > step[:, None], -torch.inf).softmax(-1)
    per_block = weights.unflatten(4, (-1, 8)).sum(-1).unflatten(3, (-1, 8)).mean(4).mean(2, keepdim=True)
    return float((found.double() - per_block).abs().max() / per_block.abs().max())


def main() -> int:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    options = parser.parse_args()
    device, failed = torch.device(options.device), []
    torch.backends.cuda.matmul.allow_tf32 = False
    begun = time.monotonic()
    chosen = {name: case for name, case in CASES.items() if options.cases in name}
    for name, case in chosen.items():
        try:
            error = error_of(case, device)
        except Exception as reason:  # a failing case must not stop the others
            print(f"{name}: {type(reason).__name__}: {str(reason)[:300]}", flush=True)
            failed.append(name)
            continue
        failed += [] if error <= BOUNDS[case.dtype] else [name]
        print(f"{name}: error {error:.1e}, {time.monotonic() - begun:.0f} s", flush=True)
    error = estimate_error(device)
    failed += [] if error <= 1e-4 else ["the estimate"]
    print(f"the estimate: error {error:.1e}")
    print(f"failed: {', '.join(failed)}" if failed else f"{len(chosen) + 1} cases are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
