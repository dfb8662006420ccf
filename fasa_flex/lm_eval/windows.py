"""Scoring a continuation in one forward pass, exactly as if it had been decoded token by token.

A request is a context and a continuation. The model sees all tokens but the last, ``m`` of them, and the queries at
slots ``m - n .. m - 1`` predict the ``n`` tokens of the continuation. In decoding the prompt is prefilled densely, so
the first of these queries, that of the prompt's last token, is dense, and the other ``n - 1``, at slots
``>= m - (n - 1)``, are sparse: each selects its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # positions whose log-probabilities [rows, V] exist at one time


@dataclass(frozen=True)
class Window:
    """One request, ready for a forward pass.

    Attributes:
        ids: the m tokens that the model sees.
        targets: the n tokens to score, predicted by the last n queries.
        sparse_from: slot of the first sparse query; earlier ones are dense.
        dropped: tokens cut off on the left because the request was too long.
    """

    ids: list[int]
    targets: list[int]
    sparse_from: int
    dropped: int

    @classmethod
    def of(
        cls,
        context: list[int],
        continuation: list[int],
        max_length: int,
        *,
        sparse_tail: int = 0,
        dense_prefix: int = 0,
    ) -> Window:
        """Lay out a request; more than ``max_length`` input tokens are cut on the left.

        Args:
            context: token ids of the context, at least one.
            continuation: token ids of the continuation, at least one.
            max_length: the model's maximum, in tokens.
            sparse_tail: number of the context's last queries that are sparse.
            dense_prefix: queries at slots below this one are dense.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than ``max_length``.
        """
        if not context or not continuation:
            raise ValueError(
                f"a request needs a context and a continuation, got {len(context)} and {len(continuation)} tokens; "
                "check the task's doc_to_text and doc_to_target."
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"the continuation has {len(continuation)} tokens, the model takes {max_length}; "
                "shorten it, or raise max_length if the model allows."
            )
        whole = context + continuation
        kept = whole[-(max_length + 1) :]
        first = len(kept) - len(continuation)
        return cls(
            ids=kept[:-1],
            targets=continuation,
            sparse_from=max(first - sparse_tail, dense_prefix, 0),
            dropped=len(whole) - len(kept),
        )

    @property
    def first(self) -> int:
        """Slot of the query that predicts the first target."""
        return len(self.ids) - len(self.targets)

    @property
    def unscored(self) -> int:
        """Number of queries at the start that are dense and predict no target, less one.

        The last of them runs with the rest, which is then never a single dense token: a forward of one token counts as
        a decode step.
        """
        return max(0, min(self.first, self.sparse_from) - 1)

    @property
    def is_dense(self) -> bool:
        """Whether every target is predicted by a dense query, whatever the budget."""
        return self.sparse_from >= len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Windows in one batch, padded on the right.

    Attributes:
        ids: int64 [B, L].
        mask: int64 [B, L], 1 = token, 0 = padding.
        start: int64 [B], slot of each row's first sparse query.
        stop: int64 [B], each row's first padding slot.
        keep: number of last positions that cover every scored query.
    """

    ids: Tensor
    mask: Tensor
    start: Tensor
    stop: Tensor
    keep: int

    @classmethod
    def of(cls, windows: Sequence[Window], pad: int, device: torch.device) -> Batch:
        """Pad the windows to the longest of them."""
        lengths = [len(window.ids) for window in windows]
        width = max(lengths)
        stop = torch.tensor(lengths, device=device)
        rows = [window.ids + [pad] * (width - length) for window, length in zip(windows, lengths, strict=True)]
        return cls(
            ids=torch.tensor(rows, device=device),
            mask=(torch.arange(width, device=device) < stop[:, None]).long(),
            start=torch.tensor([window.sparse_from for window in windows], device=device),
            stop=stop,
            keep=width - min(window.first for window in windows),
        )

    def rows(self, logits: Tensor, windows: Sequence[Window]) -> list[Tensor]:
        """Each window's scored logits [n, V], from the logits [B, keep, V] of the last ``keep`` positions."""
        offset = self.ids.shape[1] - self.keep
        return [
            row[window.first - offset : len(window.ids) - offset] for row, window in zip(logits, windows, strict=True)
        ]


def score(logits: Tensor, targets: list[int], dtype: torch.dtype | None = None) -> tuple[float, bool]:
    """Log-likelihood of ``targets`` in nats, and whether greedy decoding would have written them.

    Args:
        logits: float [n, V], one row for each target.
        targets: n token ids.
        dtype: dtype of the softmax; None is that of the logits, as in lm-eval.
    """
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    total, greedy = 0.0, True
    for part, target in zip(logits.split(_ROWS), wanted.split(_ROWS), strict=True):
        chosen = F.log_softmax(part, dim=-1, dtype=dtype).gather(1, target)
        total += float(chosen.double().sum())
        greedy = greedy and bool((part.argmax(dim=-1, keepdim=True) == target).all())
    return total, greedy
