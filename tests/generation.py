"""Generation with a tiny model: a profile for it, tokens with their logits, and the method as a plain decode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import oracle
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, RotaryLayout, calibrate

Ids = Callable[..., Tensor]
Reader = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
Attention = Callable[[PreTrainedModel, Reader], AbstractContextManager[None]]
PROMPT, NEW = 40, 12


def profile_of(model: PreTrainedModel) -> FasaProfile:
    """A profile that fits, with a table of its own: different chunks in every layer and head, and no ties."""
    generator = torch.Generator().manual_seed(11)
    sample = torch.randint(3, 64, (16,), generator=generator)
    made = calibrate(model, [sample], top_k=8, max_new_tokens=1, progress=False)
    return FasaProfile(torch.rand(made.agreement.shape, generator=generator), made.layout, made.provenance)


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [B, N] and their logits [B, N, V], greedy unless told otherwise; sampling is seeded."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def decode_reader(model: PreTrainedModel, profile: FasaProfile, config: FasaConfig) -> Reader:
    """The method as a straightforward decode: one query at a time through the oracle, everything else dense."""
    pairs = RotaryLayout.half_split(profile.agreement.shape[-1] * 2).chunks.numpy()
    n_tip = config.n_tip or profile.agreement.shape[-1] * 2 // 8
    kv_heads = 2 if config.per == "kv_head" else None

    def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if q.shape[2] > 1 or layer in config.dense_layers:
            return None
        chunks = pairs[oracle.dominant(profile.agreement[layer].double().numpy(), n_tip, kv_heads)]
        result = oracle.fasa(
            *(x.detach().double().numpy() for x in (q, k, v)),
            chunks,
            n_fac=config.n_fac,
            n_sink=config.n_sink,
            n_recent=config.n_recent,
            group_reduce=config.group_reduce,
        )
        return torch.from_numpy(result.out).to(q.dtype)

    return read


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, length - len(row) :], mask[b, length - len(row) :] = row, 1
    return ids, mask
