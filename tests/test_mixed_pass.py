"""One forward with a boundary equals token-by-token sparse decode."""

from __future__ import annotations

import pytest
import torch
from cases import unrounded
from families import tiny
from generation import Ids, close, profile_of, token_by_token
from sentences import raises_sentence
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable

CONFIGS = [
    unrounded(n_fac=5),
    unrounded(n_fac=0.15, n_tip=3, dense_layers=()),
    unrounded(n_fac=6, n_sink=1, n_recent=2, group_reduce="none"),
    unrounded(n_fac=6, per="query_head", backend="reference"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_fac} {c.n_sink}+{c.n_recent} {c.per} {c.group_reduce}")
@pytest.mark.parametrize("start", [1, 20, 39])
def test_one_forward_equals_token_by_token(model: PreTrainedModel, ids: Ids, config: FasaConfig, start: int) -> None:
    row = ids(40)
    with torch.no_grad():
        dense = model(row[None]).logits[0]
    with enable(model, profile_of(model), config) as fasa:
        expected = token_by_token(model, row, start)
        fasa.stats.reset()
        with fasa.sparse_from(torch.tensor([start])), torch.no_grad():
            got = model(row[None]).logits[0]
        sparse_layers = 3 - len(config.dense_layers)
        fits = config.n_fac if isinstance(config.n_fac, int) else 1
        assert fasa.stats.sparse_queries == sparse_layers * (40 - max(start, fits))
        assert fasa.stats.dense_queries == 3 * 40 - fasa.stats.sparse_queries
    close(got, expected)
    assert (got[39] - dense[39]).abs().max() > 1e-2  # the continuation did not stay dense
    close(got[: min(start, 40)], dense[: min(start, 40)])  # the context did


def test_right_padded_batch_with_different_boundaries(model: PreTrainedModel, ids: Ids) -> None:
    lengths, starts = (40, 33, 21, 12), (20, 32, 1, 12)
    rows = [ids(n, seed=n) for n in lengths]
    batch = torch.zeros(4, 40, dtype=torch.long)
    for b, row in enumerate(rows):
        batch[b, : len(row)] = row
    with enable(model, profile_of(model), unrounded(n_fac=5)) as fasa:
        expected = [token_by_token(model, row, start) for row, start in zip(rows, starts, strict=True)]
        for mask in (None, (torch.arange(40) < torch.tensor(lengths)[:, None]).long()):
            fasa.stats.reset()
            with fasa.sparse_from(torch.tensor(starts), torch.tensor(lengths)), torch.no_grad():
                got = model(batch, attention_mask=mask).logits
            for b, length in enumerate(lengths):
                close(got[b, :length], expected[b])
            sparse = sum(n - max(start, 5) for n, start in zip(lengths, starts, strict=True))
            assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, sparse, sparse]
            assert [layer.dense_queries for layer in fasa.stats.per_layer] == [sum(lengths)] + 2 * [
                sum(lengths) - sparse
            ]


def test_left_padded_batch_counts_slots_with_the_padding(llama: PreTrainedModel, ids: Ids) -> None:
    row, pad, start = ids(30), 9, 17
    with enable(llama, profile_of(llama), unrounded(n_fac=5, n_sink=1)) as fasa:
        expected = token_by_token(llama, row, start)
        padded = torch.cat([torch.zeros(pad, dtype=torch.long), row])[None]
        slots = torch.arange(pad + 30)[None]
        with fasa.sparse_from(torch.tensor([start + pad])), torch.no_grad():
            got = llama(padded, attention_mask=(slots >= pad).long(), position_ids=(slots - pad).clamp(min=0)).logits
    close(got[0, pad:], expected)


@pytest.mark.parametrize("cached", [8, 17, 20, 29])
def test_boundaries_are_absolute_slots_of_the_cache(llama: PreTrainedModel, ids: Ids, cached: int) -> None:
    """The same boundary whether the context is in the cache already, in part, or beyond."""
    row, start = ids(30), 17
    with enable(llama, profile_of(llama), unrounded(n_fac=5)) as fasa, torch.no_grad():
        expected = token_by_token(llama, row, start)
        cache = DynamicCache(config=llama.config)
        with fasa.sparse_from(torch.tensor([start])):
            first = llama(row[None, :cached], past_key_values=cache).logits[0]
            second = llama(row[None, cached:], past_key_values=cache).logits[0]
    close(torch.cat([first, second]), expected)


@pytest.mark.parametrize("n_fac", [5, 0.25])
@pytest.mark.parametrize("cached", [0, 8, 17, 29, 39])
def test_layers_with_a_sliding_window_beside_sparse_ones(ids: Ids, n_fac: float, cached: int) -> None:
    """The cache of a sliding-window layer drops its first slots: an index into it is not an absolute slot."""
    model, row, start = tiny("Gemma 3"), ids(40), 25
    with enable(model, profile_of(model), unrounded(n_fac=n_fac)) as fasa, torch.no_grad():
        expected = token_by_token(model, row, start)
        fasa.stats.reset()
        cache = DynamicCache(config=model.config)
        with fasa.sparse_from(torch.tensor([start])):
            parts = [
                model(part[None], past_key_values=cache).logits[0] for part in row.tensor_split([cached]) if len(part)
            ]
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 15, 0]
    close(torch.cat(parts), expected)


def test_full_budget_is_bit_identical_to_dense(model: PreTrainedModel, ids: Ids) -> None:
    batch = ids(40, rows=3)
    with torch.no_grad():
        dense = model(batch).logits
        with enable(model, profile_of(model), unrounded(n_fac=40, dense_layers=())) as fasa:
            with fasa.sparse_from(torch.tensor([0, 20, 40])):
                assert torch.equal(model(batch).logits, dense)
            assert fasa.stats.sparse_queries == 0


def test_a_boundary_at_the_end_is_dense(llama: PreTrainedModel, ids: Ids) -> None:
    batch = ids(40, rows=2)
    with torch.no_grad():
        dense = llama(batch).logits
        with enable(llama, profile_of(llama), unrounded(n_fac=4)) as fasa, fasa.sparse_from(torch.tensor([40, 40])):
            assert torch.equal(llama(batch).logits, dense)


def test_the_boundary_ends_with_its_context_even_after_an_error(llama: PreTrainedModel, ids: Ids) -> None:
    batch = ids(40, rows=1)

    def fail() -> None:
        with fasa.sparse_from(torch.tensor([5])):
            assert not torch.equal(llama(batch).logits, before)
            raise KeyError

    with torch.no_grad(), enable(llama, profile_of(llama), unrounded(n_fac=4)) as fasa:
        before = llama(batch).logits
        with pytest.raises(KeyError):
            fail()
        assert torch.equal(llama(batch).logits, before)


@pytest.mark.parametrize(
    ("start", "stop", "said"),
    [
        (torch.tensor([5, 5, 5]), None, "start names 3 rows, the batch has 2"),
        (torch.tensor(5), None, "start must be .* got torch.int64 5;"),
        (torch.tensor([[5], [5]]), None, r"start must be .* got torch.int64 \[\[5\], \[5\]\];"),
        (torch.tensor([-1, 5]), None, r"start must be .* got torch.int64 \[-1, 5\];"),
        (torch.tensor([5, 5]), torch.tensor([9]), r"stop must be .* got torch.int64 \[9\];"),
        (torch.tensor([5.0, 5.0]), None, r"start must be .* got torch.float32 \[5.0, 5.0\];"),
    ],
    ids=["rows", "scalar", "two dimensions", "negative", "stop of another length", "float"],
)
def test_boundaries_that_do_not_fit_are_refused(
    llama: PreTrainedModel, ids: Ids, start: Tensor, stop: Tensor | None, said: str
) -> None:
    profile = profile_of(llama)
    with (
        enable(llama, profile, unrounded(n_fac=4)) as fasa,
        raises_sentence(ValueError, match=said),
        fasa.sparse_from(start, stop),
        torch.no_grad(),
    ):
        llama(ids(40, rows=2))
