"""Checks of what kernels write: the completion's state, and a decoded token's entries in a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evals.bench.calls import KV_HEADS
from fasa_flex.core.completion import CompletionState
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks

AGAIN = 1000
"""Updates of one state on a GPU that must be equal."""


def check_state(dtype: str, head_dim: int, first_order: bool, device: torch.device) -> dict[str, Any]:
    """Compare a completion's state on the device and on a CPU, over a prompt, its answer and a crop.

    Then `AGAIN` updates of one state must be equal bit by bit: threads that read what others write rarely differ.
    """
    length, batch = 1000, 3
    generator = torch.Generator().manual_seed(head_dim)
    size = (batch, KV_HEADS, length, head_dim)
    k, v = (torch.randn(size, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    valid = torch.rand(batch, length, generator=generator) > 0.2
    theirs, ours = (CompletionState.empty(k, v, first_order, at) for at in (torch.device("cpu"), device))
    there = [states.to(device) for states in (k, v, valid)]
    worst = 0.0
    for end, written in [(500, 500), *((end, 1) for end in range(501, 640)), (800, 160), (300, 20), (1000, 700)]:
        for state, (key, value, real) in ((theirs, (k, v, valid)), (ours, there)):
            counted = real[:, :end].cumsum(-1)
            state.advance(key[:, :, :end], value[:, :, :end], real[:, :end], counted, written)
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            if other.numel():
                away = (mine.cpu().double() - other.double()).norm() / other.double().norm().clamp(min=1e-3)
                worst = max(worst, float(away))
    first, differ = CompletionState.empty(k, v, first_order, device), torch.zeros((), dtype=torch.long, device=device)
    counted = there[2].cumsum(-1)
    first.advance(*(states[:, :, :600] for states in there[:2]), there[2][:, :600], counted[:, :600], 600)
    begun = first.change(Tensor.clone)
    first.advance(*there, counted, 400)
    for _ in range(AGAIN if device.type == "cuda" else 2):
        state = begun.change(Tensor.clone)
        state.advance(*there, counted, 400)
        equal = [(mine == other).all() for mine, other in zip(state.tensors, first.tensors, strict=True)]
        differ += ~torch.stack(equal).all()
    right = worst <= (1e-4 if dtype == "float32" else 1e-2)
    return {"error": worst, "differ": int(differ), "ok": right and not differ}


def check_writing(dtype: str, packed: str, centred: bool, device: torch.device) -> dict[str, Any]:
    """Compare a decoded token's cache entries by the kernel and by PyTorch's operators, bit by bit."""
    from fasa_flex.backends.triton.writing import write_token  # Triton is installed with CUDA only

    held, kind = (4, KV_HEADS, 100, 64), getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    k, v = (torch.randn(held, generator=generator, device=device).to(kind) for _ in range(2))
    new = [(3 * torch.randn(4, KV_HEADS, 1, 64, generator=generator, device=device)).to(kind) for _ in range(2)]
    dims = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(h))[:20] for h in range(KV_HEADS)])
    mean_key = torch.randn(KV_HEADS, 64, generator=generator, device=device) if centred else None
    scorer = DominantChunks(dims.to(device), mean_key)
    chosen: Any = None if packed == "tiles" else packed
    ours = PackedKeys.of(scorer.pack(k), chosen)
    theirs = ours.change(Tensor.clone)
    theirs.write(scorer.pack(new[0]), 50)
    scales = None if ours.scales is None else ours.scales.squeeze(3)
    write_token(*new, k, v, ours.tiles.squeeze(4), scales, scorer.dims, mean_key, 50)
    pairs = [(ours.tiles, theirs.tiles), (k[:, :, 50], new[0][:, :, 0]), (v[:, :, 50], new[1][:, :, 0])]
    if ours.scales is not None and theirs.scales is not None:
        pairs.append((ours.scales, theirs.scales))
    return {"ok": all(torch.equal(mine, other) for mine, other in pairs)}
