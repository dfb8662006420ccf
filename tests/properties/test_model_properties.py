"""A model under `enable`: one forward with a boundary = token-by-token decode, padded or not, in any split.

The ways differ in rounding, and near-ties could rank differently with it: models are in float64, and scores are rounded
to a grid that is coarse for float64 and exact in float32.
"""

from __future__ import annotations

import functools

import generation
import oracle
import torch
from families import LAYERS, VOCABULARY, tiny
from generation import profile_of
from generation import token_by_token as decoded
from hypothesis import given
from hypothesis import strategies as st
from properties.calls import cases
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.core.scoring import DominantChunks
from fasa_flex.model.handle import Fasa

NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LENGTH = 24


@functools.cache
def model_and_profile(name: str) -> tuple[PreTrainedModel, FasaProfile]:
    model = tiny(name)
    profile = profile_of(model)
    return model.double(), profile


class RoundedChunks(DominantChunks):
    """TIP in float64, rounded to multiples of 1/64."""

    def score(self, query: Tensor, key: Tensor, packed_keys: object = None) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        group = heads // kv_heads
        rows = []
        for h in range(heads):
            dims = self.dims[h if len(self.dims) == heads else h // group]
            rows.append(query[:, h][..., dims].double() @ key[:, h // group][..., dims].double().mT)
        return (torch.stack(rows, 1) * 64).round().div(64).float().unflatten(1, (kv_heads, group))


def rounded(model: PreTrainedModel, profile: FasaProfile, config: FasaConfig) -> Fasa:
    """`enable` with rounded scores."""
    tables = profile.dominant_dims(config.chunks_of(profile.layout.head_dim), config.per)
    return enable(model, profile, config, scorer=lambda layer: RoundedChunks.from_chunks(tables[layer]))


@st.composite
def configs(draw: st.DrawFn) -> FasaConfig:
    per = draw(st.sampled_from(["kv_head", "kv_head", "query_head"]))
    n_sink, n_recent = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return FasaConfig(
        n_tip=draw(st.integers(1, 8)),
        n_fac=draw(st.integers(max(1, n_sink + n_recent), 12) | st.sampled_from([0.1, 0.25, 0.5])),
        n_sink=n_sink,
        n_recent=n_recent,
        dense_layers=draw(st.sampled_from([(), (0,), (1,), (0, 2)])),
        per=per,
        group_reduce=draw(st.sampled_from(["max", "mean", "none"])),
        backend=draw(st.sampled_from(["gather", "reference"])),
    )


def rows_of(data: st.DataObject, rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    lengths = [data.draw(st.integers(1, LENGTH)) for _ in range(rows)]
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids [B, T], and the attention mask and positions of left- or right-padded rows."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        at = slice(length - len(row), None) if left else slice(len(row))
        ids[b, at], mask[b, at] = row, 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


close = functools.partial(generation.close, tolerance=1e-6)


@cases(0.2)
@given(st.sampled_from(NAMES), configs(), st.data())
@torch.no_grad()
def test_one_forward_with_boundaries_is_a_decode(name: str, config: FasaConfig, data: st.DataObject) -> None:
    """Rows of different lengths, padded on either side, each with a boundary of its own, in one or two forwards."""
    model, profile = model_and_profile(name)
    rows = rows_of(data, data.draw(st.integers(1, 3)))
    starts = [data.draw(st.integers(0, len(row))) for row in rows]
    left = data.draw(st.booleans())
    ids, kwargs = padded(rows, left)
    length = ids.shape[1]
    skipped = [length - len(row) if left else 0 for row in rows]
    with rounded(model, profile, config) as fasa:
        # what precedes a first sparse query is dense: a decode that starts with a sparse query begins with one token
        expected = [decoded(model, row, start, DynamicCache()) for row, start in zip(rows, starts, strict=True)]
        slots = torch.tensor([start + pad for start, pad in zip(starts, skipped, strict=True)])
        with fasa.sparse_from(slots):
            got = model(ids, **kwargs).logits
            # a forward of one token is a decode step whatever the boundary, so no part is that short
            cut = data.draw(st.sampled_from([length, *range(2, length - 1)]))
            cache = DynamicCache()
            parts = []
            for part in (slice(cut), slice(cut, length)):
                if part.start != length:
                    now = {"attention_mask": kwargs["attention_mask"][:, : part.stop]}
                    now["position_ids"] = kwargs["position_ids"][:, part]
                    parts.append(model(ids[:, part], past_key_values=cache, **now).logits)
    for b, (pad, row) in enumerate(zip(skipped, rows, strict=True)):
        close(got[b, pad : pad + len(row)], expected[b])
        close(torch.cat(parts, 1)[b, pad : pad + len(row)], expected[b])


@cases(0.2)
@given(st.sampled_from(NAMES), configs(), st.data())
@torch.no_grad()
def test_decoding_a_padded_batch_is_decoding_its_rows(name: str, config: FasaConfig, data: st.DataObject) -> None:
    """Left-padded rows decoded together equal each alone, on a plain cache and on one with packed keys."""
    model, profile = model_and_profile(name)
    rows = rows_of(data, data.draw(st.integers(1, 3)))
    steps = data.draw(st.integers(1, 4))
    ids, kwargs = padded(rows, left=True)
    new = torch.randint(3, VOCABULARY, (len(rows), steps), generator=torch.Generator().manual_seed(steps))
    caches = [DynamicCache] + ([lambda: FasaCache(model, profile, config)] if config.per == "kv_head" else [])
    with rounded(model, profile, config):
        alone = [
            decoded(model, torch.cat([row, more]), len(row), DynamicCache())
            for row, more in zip(rows, new, strict=True)
        ]
        for make in caches:
            cache, mask = make(), kwargs["attention_mask"]
            logits = [model(ids, past_key_values=cache, **kwargs).logits[:, -1:]]
            for step in range(steps):
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
                position = mask.sum(-1, keepdim=True) - 1
                out = model(new[:, step : step + 1], past_key_values=cache, attention_mask=mask, position_ids=position)
                logits.append(out.logits)
            for b, row in enumerate(rows):
                close(torch.cat(logits, 1)[b], alone[b][len(row) - 1 :])


@cases(0.2)
@given(st.sampled_from(NAMES), configs(), st.data())
@torch.no_grad()
def test_every_query_is_counted_once(name: str, config: FasaConfig, data: st.DataObject) -> None:
    """Dense and sparse queries of a decode add up to tokens times layers, and sparse ones had more keys than budget."""
    model, profile = model_and_profile(name)
    (row,) = rows_of(data, 1)
    start = data.draw(st.integers(1, len(row)))
    with rounded(model, profile, config) as fasa:
        decoded(model, row, start, DynamicCache())
        over = [oracle.budget(config.n_fac, keys) < keys for keys in range(start + 1, len(row) + 1)]
        sparse = [0 if layer in config.dense_layers else sum(over) for layer in range(LAYERS)]
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == sparse
        assert fasa.stats.dense_queries == LAYERS * len(row) - sum(sparse)
