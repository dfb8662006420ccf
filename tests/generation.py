"""Generation with a tiny model: a profile for it, tokens with their logits, and the method as a plain decode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, RotaryLayout, calibrate
from fasa_flex.hf.compatibility import cache_argument

Ids = Callable[..., Tensor]
Reader = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
Attention = Callable[[PreTrainedModel, Reader], AbstractContextManager[None]]
PROMPT, NEW = 40, 12


def profile_of(model: PreTrainedModel, mean_key: bool = False) -> FasaProfile:
    """A profile that fits, with a table of its own: different chunks in every layer and head, and no ties."""
    generator = torch.Generator().manual_seed(11)
    sample = torch.randint(3, 64, (16,), generator=generator)
    made = calibrate(model, [sample], top_k=8, max_new_tokens=1, progress=False)
    agreement = torch.rand(made.agreement.shape, generator=generator)
    means = torch.randn(made.mean_key.shape, generator=generator) if mean_key else None
    return FasaProfile(agreement, made.layout, made.provenance, mean_key=means)


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [B, N] and their logits [B, N, V], greedy unless told otherwise; sampling is seeded."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def by_the_oracle(
    profile: FasaProfile, config: FasaConfig, layer: int, pairs: npt.ArrayLike, kv_heads: int
) -> dict[str, Any]:
    """What `oracle.fasa` is to be told of a layer: chunks by agreement among ``pairs``, and what ``config`` says."""
    assert config.criterion in (None, "agreement")
    assert profile.variance is None
    by_key_head = config.per == "kv_head"
    table, n_tip = profile.agreement[layer].double().numpy(), config.chunks_of(profile.layout.head_dim)
    strengths = {"none": None, "mean": 0.0}
    return {
        "chunks": np.asarray(pairs)[oracle.dominant(table, n_tip, kv_heads if by_key_head else None)],
        "n_fac": config.n_fac,
        "n_sink": config.n_sink,
        "n_recent": config.n_recent,
        "group_reduce": config.group_reduce,
        "mean_key": profile.mean_key[layer].double().numpy() if by_key_head else None,
        "bits": {None: None, "int8": 8, "int4": 4}[config.packed_dtype] if by_key_head else None,
        "strength": strengths.get(config.completion or "first_order", config.completion_strength),
    }


def decode_reader(model: PreTrainedModel, profile: FasaProfile, config: FasaConfig) -> Reader:
    """The method as a straightforward decode: one query at a time through the oracle, everything else dense."""
    pairs = RotaryLayout.half_split(profile.agreement.shape[-1] * 2).chunks.numpy()

    def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if q.shape[2] > 1 or layer in config.dense_layers:
            return None
        options = by_the_oracle(profile, config, layer, pairs, k.shape[1])
        result = oracle.fasa(*(x.detach().double().numpy() for x in (q, k, v)), **options)
        return torch.from_numpy(result.out).to(q.dtype)

    return read


@torch.no_grad()
def token_by_token(model: PreTrainedModel, row: Tensor, start: int, cache: Cache | None = None, cut: int = 0) -> Tensor:
    """Logits [T, V] of one row [T]: ``start`` tokens in a prefill, or in two from ``cut`` on, then one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [row[:cut], row[cut:start], *(token[None] for token in row[start:])]
    return torch.cat([model(part[None], past_key_values=cache).logits[0] for part in parts if len(part)])


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: list[int], continuation: list[int], prompt: int) -> float:
    """Of a continuation, in nats: ``prompt`` tokens in a prefill, then one by one."""
    tokens = context + continuation
    state = cache_argument(model, DynamicCache(config=model.config))
    out = model(torch.tensor([tokens[:prompt]]), **state)
    total = 0.0
    for slot in range(prompt, len(tokens)):
        if slot >= len(context):
            total += out.logits[0, -1].double().log_softmax(-1)[tokens[slot]].item()
        if slot < len(tokens) - 1:
            out = model(torch.tensor([[tokens[slot]]]), **state)
    return total


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """`torch.testing.assert_close`, the absolute tolerance in units of the largest expected number."""
    torch.testing.assert_close(got, expected, atol=tolerance * float(expected.abs().max()), rtol=min(tolerance, 1e-5))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, length - len(row) :], mask[b, length - len(row) :] = row, 1
    return ids, mask
