"""Parts of `evals.quality.agreement` about the cache: packed keys in fewer bits, and keys that FASA-M has to fetch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evals.quality.documents import Rows, Study
from evals.quality.steps import (
    BUDGETS,
    N_TIP,
    Steps,
    attention,
    dominant,
    found,
    held,
    overlap,
    ranked,
    scored,
    shared_ranking,
    valid_of,
)
from fasa_flex.core.packed_keys import PackedDtype, PackedKeys
from fasa_flex.core.scoring import DominantChunks

PRECISIONS: tuple[PackedDtype, ...] = ("bfloat16", "float16", "int8")


def precision(study: Study) -> Rows:
    """Agreement of the selection by packed keys of fewer bits (``packed_dtype``), which are used for ranking only."""

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid, weights = valid_of(steps), attention(steps, study.scaling)
        dims = study.profiles[kind, "true planes"].dominant_dims(N_TIP)

        def selected(dtype: PackedDtype | None) -> Tensor:
            scores = []
            for chunks, query, key in zip(dims, steps.query, steps.key, strict=True):
                scorer = DominantChunks.from_chunks(chunks)
                packed = PackedKeys.of(scorer.pack(key[None]), dtype).rows(key.shape[1]).float()
                scores.append(scorer(query[None], key[None], packed))
            return ranked(shared_ranking(torch.cat(scores), valid, study.scaling), valid)

        full = selected(None)
        figures = {}
        for dtype in PRECISIONS:
            slots = selected(dtype)
            for budget in BUDGETS:
                figures[dtype, budget, "selected in common"] = overlap(full, slots, budget)
                figures[dtype, budget, "attention held"] = held(weights, slots, budget)
        return figures | {("float32", budget, "attention held"): held(weights, full, budget) for budget in BUDGETS}

    return study.rows(measure, "packed_dtype", "budget", "figure")


def renewal(study: Study) -> Rows:
    """Share of the selected keys that are not on the device, which FASA-M has to fetch.

    FASA-M keeps the keys of the last step. The other rows show the effect of keeping more: the keys of the last two
    steps, which needs no more transfers, or the best 2 or 4 budgets of the last step, which have to be prefetched.
    """

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid = valid_of(steps)
        tip = scored(dominant(study.profiles[kind, "true planes"], N_TIP), steps)
        slots = ranked(shared_ranking(tip, valid, study.scaling), valid)
        figures = {}
        for budget in BUDGETS:
            now, last, second = slots[..., 2:, :budget], slots[..., 1:-1, :], slots[..., :-2, :]
            holdings = {
                "the last step": last[..., :budget],
                "the last two steps": torch.cat([last[..., :budget], second[..., :budget]], dim=-1),
                "the last step, 2 budgets": last[..., : 2 * budget],
                "the last step, 4 budgets": last[..., : 4 * budget],
            }
            for holding, kept in holdings.items():
                figures[budget, holding] = 1 - found(now, kept, kept.shape[-1]).mean((-1, -2)).flatten(1)
        return figures

    return study.rows(measure, "budget", "held")
