"""Where the boundary lies, what is padded, and what a continuation scores: written-out examples."""

from __future__ import annotations

import pytest
import torch

from fasa_flex.lm_eval.windows import Batch, Window, score

CPU = torch.device("cpu")


def test_boundary_of_a_short_request() -> None:
    window = Window.of([1, 2, 3, 4], [5, 6, 7], max_length=10)
    assert window.ids == [1, 2, 3, 4, 5, 6]  # the last token is only ever predicted
    assert window.first == 3  # token 4, the prompt's last, predicts token 5 ...
    assert window.sparse_from == 4  # ... densely; token 5 at slot 4 is the first to select for itself
    assert window.dropped == 0


def test_one_token_has_no_sparse_query_unless_the_tail_is() -> None:
    assert Window.of([1, 2, 3], [4], max_length=10).sparse_from == 3 == len([1, 2, 3])
    assert Window.of([1, 2, 3], [4], max_length=10, sparse_tail=1).sparse_from == 2
    assert Window.of([1, 2, 3], [4], max_length=10, sparse_tail=99).sparse_from == 0


def test_rolling_window_is_sparse_behind_the_dense_prefix() -> None:
    assert Window.of([9], [1, 2, 3, 4], max_length=10).sparse_from == 1
    assert Window.of([9], [1, 2, 3, 4], max_length=10, dense_prefix=3).sparse_from == 3


def test_too_long_is_cut_on_the_left_and_keeps_the_boundary() -> None:
    window = Window.of([1, 2, 3, 4, 5, 6], [7, 8], max_length=4)
    assert window.ids == [4, 5, 6, 7]
    assert (window.first, window.sparse_from, window.dropped) == (2, 3, 3)


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], [])])
def test_empty_sides_are_refused(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match="needs a context and a continuation"):
        Window.of(context, continuation, max_length=4)


def test_continuation_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has 5 tokens, the model takes 4"):
        Window.of([1], [1, 2, 3, 4, 5], max_length=4)


def test_batch_is_padded_on_the_right() -> None:
    windows = [Window.of([1, 2, 3, 4], [5, 6], 10), Window.of([7], [8, 9], 10)]
    batch = Batch.of(windows, pad=0, device=CPU)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.start.tolist() == [4, 1]
    assert batch.stop.tolist() == [5, 2]
    assert batch.keep == 5  # the second row's first scored query is at slot 0


def test_rows_are_the_scored_queries() -> None:
    windows = [Window.of([1, 2, 3, 4, 5], [6, 7], 10), Window.of([1, 2, 3], [8, 9], 10)]
    batch = Batch.of(windows, pad=0, device=CPU)
    slots = torch.arange(6.0).expand(2, 6)[..., None]  # "logits" that name their slot
    rows = batch.rows(slots[:, -batch.keep :], windows)
    assert [row[:, 0].tolist() for row in rows] == [[4, 5], [2, 3]]


@pytest.mark.parametrize("length", [1, 3, 1100])  # 1100 rows are scored in three parts
def test_score_is_the_sum_of_log_probabilities(length: int) -> None:
    logits = torch.randn(length, 7, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    targets = logits.argmax(-1).tolist()
    total, greedy = score(logits, targets)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = sum(probabilities[i, token].log().item() for i, token in enumerate(targets))
    assert total == pytest.approx(expected, rel=1e-12)
    assert greedy
    targets[-1] = (targets[-1] + 1) % 7
    assert not score(logits, targets)[1]
