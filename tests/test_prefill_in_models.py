"""A prefill by blocks in models: wherever a prompt is read, in one forward or several, padded or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny
from generation import Ids, close, generate, left_padded, profile_of, token_by_token
from sentences import raises_sentence
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.baselines import AllDimensions
from fasa_flex.prefill.attention import block_sparse_attention
from fasa_flex.prefill.estimators import Blocks, oracle
from fasa_flex.prefill.grid import BLOCK
from fasa_flex.prefill.selection import BlockBudget, BlockLists

POSITIONS, LENGTH = 2048, 700


def blocks(share: float = 0.6, n_fac: float = 16, **changes: Any) -> FasaConfig:
    fields: dict[str, Any] = {"n_fac": n_fac, "dense_layers": (), "prefill": "blocks", "prefill_share": share}
    return FasaConfig(**{**fields, **changes})


@pytest.fixture
def long_llama() -> PreTrainedModel:
    return tiny("Llama", max_position_embeddings=POSITIONS)


@pytest.fixture
def always_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend by blocks, also to all of them."""
    monkeypatch.setattr(BlockBudget, "covers", lambda budget, n_keys: False)


def in_chunks(model: PreTrainedModel, ids: Tensor, size: int, cache: Any) -> Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(size, 1)], 1)


@torch.no_grad()
def test_a_share_of_one_is_the_models_own_attention(long_llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(LENGTH, rows=2)
    dense = long_llama(prompt).logits
    with enable(long_llama, profile_of(long_llama), blocks(1.0)) as fasa:
        assert torch.equal(long_llama(prompt).logits, dense)
        assert (fasa.stats.block_queries, fasa.stats.dense_queries) == (0, 3 * 2 * LENGTH)
    with enable(long_llama, profile_of(long_llama), blocks(0.6)):
        assert not torch.allclose(long_llama(prompt).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("size", [128, 256])
def test_chunks_of_whole_blocks_give_what_one_forward_gives(long_llama: PreTrainedModel, ids: Ids, size: int) -> None:
    prompt = ids(LENGTH, rows=1)
    with enable(long_llama, profile_of(long_llama), blocks()):
        whole = long_llama(prompt).logits
        close(in_chunks(long_llama, prompt, size, DynamicCache(config=long_llama.config)), whole)
        close(in_chunks(long_llama, prompt, size, StaticCache(config=long_llama.config, max_cache_len=900)), whole)


@torch.no_grad()
def test_padded_rows_get_what_they_get_alone(long_llama: PreTrainedModel, ids: Ids) -> None:
    rows = [ids(LENGTH), ids(300, seed=1)]
    padded, mask = left_padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with enable(long_llama, profile_of(long_llama), blocks()) as fasa:
        both = long_llama(padded, attention_mask=mask, position_ids=positions).logits
        assert fasa.stats.block_queries == 3 * (LENGTH + 300)
        for row, logits in zip(rows, both, strict=True):
            close(logits[-len(row) :], long_llama(row[None]).logits[0])
        right = torch.stack([rows[0], F.pad(rows[1], (0, LENGTH - 300))])
        behind = long_llama(right, attention_mask=mask.flip(1)).logits
        close(behind[1, :300], both[1, -300:])


@torch.no_grad()
@pytest.mark.usefixtures("always_by_blocks")
def test_a_second_turn_continues_the_grid(long_llama: PreTrainedModel, ids: Ids) -> None:
    """Its blocks begin in the middle of one; its queries see all earlier tokens of their blocks of keys."""
    prompt = ids(LENGTH, rows=1)
    with enable(long_llama, profile_of(long_llama), blocks(1.0)) as fasa:
        cache = DynamicCache(config=long_llama.config)
        long_llama(prompt[:, :500], past_key_values=cache)
        fasa.stats.reset()
        long_llama(prompt[:, 500:], past_key_values=cache)
        layer = fasa.stats.per_layer[1]
    assert layer.block_queries == 200
    assert layer.causal_pairs == 4 * (4 + 5 + 6)  # blocks 3, 4 and 5 of four query heads
    assert layer.block_pairs == layer.causal_pairs


@torch.no_grad()
@pytest.mark.parametrize("n_fac", [16, 1.0, 450])
def test_a_mixed_forward_equals_prefill_and_decoding(long_llama: PreTrainedModel, ids: Ids, n_fac: float) -> None:
    """With sparse decoding, dense decoding, and a budget that covers the first decoded tokens."""
    row, start = ids(LENGTH if n_fac != 450 else 460), 680 if n_fac != 450 else 430
    with enable(long_llama, profile_of(long_llama), blocks(n_fac=n_fac)) as fasa:
        expected = token_by_token(long_llama, row, start)
        counted = fasa.stats.as_dict()
        fasa.stats.reset()
        with fasa.sparse_from(torch.tensor([start])):
            mixed = long_llama(row[None]).logits[0]
        close(mixed, expected)
        assert fasa.stats.as_dict() == pytest.approx(counted)
        assert fasa.stats.block_queries == 3 * start


@torch.no_grad()
def test_generation_in_every_kind_of_cache(long_llama: PreTrainedModel, ids: Ids) -> None:
    padded, mask = left_padded([ids(LENGTH), ids(450, seed=1)])
    profile = profile_of(long_llama)
    with enable(long_llama, profile, blocks()) as fasa:
        tokens, logits = generate(long_llama, padded, mask)
        share = fasa.stats.block_share
        assert 0.5 < share < 1.0
        for options in (
            {"prefill_chunk_size": 128},
            {"cache_implementation": "static"},
            {"past_key_values": FasaCache(long_llama, profile, blocks(), placement="host")},
        ):
            other, theirs = generate(long_llama, padded, mask, **options)
            assert torch.equal(other, tokens)
            close(theirs, logits)
    with enable(long_llama, profile_of(long_llama), FasaConfig(n_fac=16, dense_layers=())):
        assert not torch.allclose(generate(long_llama, padded, mask)[1], logits)


@torch.no_grad()
@pytest.mark.usefixtures("always_by_blocks")
@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss", "Qwen3", "GLM", "DeepSeek-V3 (MLA)"])
def test_families(family: str, ids: Ids) -> None:
    """Soft caps, learned sinks, other planes and latents: all blocks are dense attention, fewer are not."""
    model = tiny(family, max_position_embeddings=POSITIONS)
    prompt = ids(450, rows=1)
    dense = model(prompt).logits
    with enable(model, profile_of(model), blocks(1.0)) as fasa:
        close(model(prompt).logits, dense, 1e-4)
        assert fasa.stats.block_queries
        assert fasa.stats.block_share == 1.0
    with enable(model, profile_of(model), blocks(0.5)) as fasa:
        assert not torch.allclose(model(prompt).logits, dense)
        assert fasa.stats.block_share < 1.0


@torch.no_grad()
@pytest.mark.usefixtures("always_by_blocks")
def test_chunks_for_each_query_head(long_llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(450, rows=1)
    dense = long_llama(prompt).logits
    with enable(long_llama, profile_of(long_llama), blocks(1.0, per="query_head")) as fasa:
        close(long_llama(prompt).logits, dense)
        assert fasa.stats.block_queries == 3 * 450


@torch.no_grad()
def test_the_first_prompt_calibrates_densely(long_llama: PreTrainedModel, ids: Ids) -> None:
    first, second = ids(LENGTH, rows=1), ids(LENGTH, seed=1, rows=1)
    dense = long_llama(first).logits
    with enable(long_llama, None, blocks()) as fasa:
        assert torch.equal(long_llama(first).logits, dense)
        assert fasa.stats.block_queries == 0
        found = long_llama(second).logits
        assert fasa.stats.block_queries == 3 * LENGTH
        profile = fasa.profile
    with enable(long_llama, profile, blocks()):
        close(long_llama(second).logits, found)


@torch.no_grad()
def test_attention_weights_are_of_the_selected_blocks(ids: Ids) -> None:
    model = tiny("Llama", max_position_embeddings=POSITIONS)
    model.set_attn_implementation("eager")
    with enable(model, profile_of(model), blocks()):
        weights = model(ids(500, rows=1), output_attentions=True).attentions[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    by_block = F.pad(weights, (0, 12, 0, 12)).unflatten(3, (4, BLOCK)).unflatten(2, (4, BLOCK)).sum((3, 5))
    assert (by_block > 0).sum(-1).tolist() == [[[1, 2, 3, 3]] * 4]


@torch.no_grad()
def test_attention_weights_of_a_completed_prefill_are_those_of_its_output(
    ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean that stands for a block's tokens gives each of them its part of the weight."""
    model = tiny("Llama", max_position_embeddings=POSITIONS)
    model.set_attn_implementation("eager")
    outs: list[tuple[Tensor, Tensor]] = []

    def noted(given: Blocks, value: Tensor, *rest: Any) -> tuple[Tensor, BlockLists]:
        out, lists = block_sparse_attention(given, value, *rest)
        outs.append((out, value))
        return out, lists

    monkeypatch.setattr("fasa_flex.model.block_prefill.block_sparse_attention", noted)
    with enable(model, profile_of(model), blocks(prefill_completion="mean")):
        weights = model(ids(500, rows=1), output_attentions=True).attentions[-1]
    out, value = outs[-1]
    repeated = value.repeat_interleave(out.shape[1] // value.shape[1], dim=1)
    torch.testing.assert_close(weights @ repeated, out, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_means_complete_the_prefill_of_every_layer(
    long_llama: PreTrainedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, profile = ids(LENGTH, rows=1), profile_of(long_llama)
    with enable(long_llama, profile, blocks(prefill_completion="mean")):
        completed = long_llama(prompt).logits
    with enable(long_llama, profile, blocks()):
        assert not torch.allclose(long_llama(prompt).logits, completed)
    path = "fasa_flex.model.block_prefill.block_sparse_attention"
    monkeypatch.setattr(path, lambda *given: block_sparse_attention(*given[:-1], completes=True))
    with enable(long_llama, profile, blocks()):
        close(long_llama(prompt).logits, completed)


@torch.no_grad()
def test_an_estimator_of_ones_own(long_llama: PreTrainedModel, ids: Ids) -> None:
    """The one of the module's docstring; and the oracle, which another estimate does not equal."""

    def by_means(given: Blocks) -> Tensor:
        query, key = given.mean_queries(BLOCK)[..., 0, :], given.mean_keys(BLOCK)[:, :, None, :, 0]
        return (given.softmax.scaling * query.float() @ key.float().mT).exp()

    prompt, found = ids(LENGTH, rows=1), []
    for estimator in (by_means, oracle):
        with enable(long_llama, profile_of(long_llama), blocks(), estimator=estimator) as fasa:
            found.append(long_llama(prompt).logits)
            assert fasa.stats.block_share < 1.0
    assert not torch.allclose(*found)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_prefills_by_blocks(long_llama: PreTrainedModel, ids: Ids) -> None:
    prompt = ids(LENGTH, rows=1)
    with enable(long_llama, profile_of(long_llama), blocks()):
        expected = long_llama(prompt).logits
        compiled: Callable[..., Any] = torch.compile(long_llama, backend="eager")
        close(compiled(prompt).logits, expected)


def test_what_has_no_chunks_or_no_backend_is_refused(long_llama: PreTrainedModel) -> None:
    with raises_sentence(ValueError, "from the dominant chunks of a profile, which AllDimensions has not"):
        enable(long_llama, None, blocks(completion="none"), scorer=lambda layer: AllDimensions())
    for backend in ("triton", "reference"):
        with raises_sentence(ValueError, f"runs on flex or gather, not '{backend}'"):
            blocks(backend=backend)
    for name, value in (("prefill_share", 0.0), ("prefill_share", 1.5), ("prefill_mass", 0), ("prefill_mass", True)):
        with raises_sentence(ValueError, f"{name} must be a share in"):
            blocks(**{name: value})
    for unread in ({"prefill_mass": 0.9}, {"prefill_completion": "mean"}):
        for prefill in ("dense", "sparse"):
            with raises_sentence(ValueError, f"is for prefill='blocks', and prefill is '{prefill}'"):
                FasaConfig(prefill=prefill, **unread)


@torch.no_grad()
def test_a_mask_that_is_not_causal_is_refused_before_anything_is_lost(long_llama: PreTrainedModel, ids: Ids) -> None:
    slot = torch.arange(LENGTH)
    windowed = ((slot <= slot[:, None]) & (slot > slot[:, None] - 100))[None, None]
    with enable(long_llama, profile_of(long_llama), blocks()):
        cache = DynamicCache(config=long_llama.config)
        with raises_sentence(ValueError, "mask of row 0 is not causal with padding"):
            long_llama(ids(LENGTH, rows=1), attention_mask=windowed, past_key_values=cache)
        assert cache.get_seq_length() == 0
