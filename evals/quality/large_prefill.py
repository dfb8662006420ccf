"""Part ``prefill`` of `evals.quality.large`: prompts prefilled by blocks, by estimator and share of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evals.quality.arms import ANSWER_TOKENS, haystack
from evals.quality.documents import Rows
from evals.quality.real_arms import ESTIMATORS
from evals.quality.steps import with_interval
from fasa_flex import FasaConfig, enable
from fasa_flex.lm_eval.haystack import heldout_text

if TYPE_CHECKING:
    from evals.quality.large import Trial

SHARES = (0.1, 0.2, 0.3, 0.5)
DENSE = 1.0
"""The budget of a dense decode step."""


class Arm(NamedTuple):
    """A prefill: share of the blocks, estimator, completion of the prefill, and the decode steps' budget."""

    share: float
    estimator: str = "pooled"
    completion: str = "none"
    n_fac: int | float = DENSE


ARMS = [Arm(share, estimator) for estimator in ("pooled", "oracle", "window", "random") for share in SHARES]
ARMS += [Arm(share, completion="mean") for share in SHARES]
ARMS += [Arm(share, n_fac=256) for share in SHARES]


class Prompt(NamedTuple):
    """Token ids, of which the first ``prefix`` are prefilled, and the true continuations of the last ones."""

    ids: Tensor
    prefix: int
    expected: Tensor


def questions(trial: Trial, count: int) -> Iterator[Prompt]:
    """Documents of held-out text; prefilled up to the end of the question, or to the last token of an answer."""
    study = trial.study
    for number in range(count):
        found = haystack(f"large/{number}", study.settings.length, study.tokenizer)
        whole = trial.tokens(found.prompt + found.answer)
        start = len(trial.tokens(found.prompt))
        yield Prompt(whole[:-1], start - 1, whole[start:])


def windows(trial: Trial, count: int, scored: int) -> Iterator[Prompt]:
    """Windows of held-out text without overlap."""
    ids, length = trial.tokens(heldout_text()), trial.study.settings.length
    for piece in ids[: len(ids) // length * length].view(-1, length)[:count]:
        yield Prompt(piece[:-1], length - scored - 1, piece[-scored:])


def prefill(trial: Trial, scored: int, count: int) -> Rows:
    """Every arm's share of right answers and nats a token, and their differences to a dense prefill.

    Args:
        trial: the model's documents.
        scored: decoded tokens of a window of text.
        count: documents of each task.
    """
    rows = []
    for task, prompts in (
        ("needles", list(questions(trial, count))),
        ("text", list(windows(trial, count, scored))),
    ):
        figures = [{"dense": _figure(trial, task, prompt)} for prompt in prompts]
        shares = {}
        for arm in ARMS:
            config = FasaConfig(
                n_fac=arm.n_fac,
                dense_layers=(),
                prefill="blocks",
                prefill_share=arm.share,
                prefill_completion=arm.completion,  # type: ignore[arg-type]  # one of `Arm`'s two
            )
            with enable(trial.study.model, trial.profile, config, estimator=ESTIMATORS[arm.estimator]) as fasa:
                for prompt, found in zip(prompts, figures, strict=True):
                    with fasa.sparse_from(torch.tensor([prompt.prefix])):
                        found[arm] = _figure(trial, task, prompt)
                shares[arm] = fasa.stats.block_share
        above = [{**each, **{(arm, "above"): each[arm] - each["dense"] for arm in ARMS}} for each in figures]
        intervals = with_interval(above)
        rows.append({"task": task, "documents": len(prompts), "dense": True, **intervals["dense"]})
        for arm in ARMS:
            difference = [intervals[arm, "above"][name] for name in ("mean", "low", "high")]
            own = {**arm._asdict(), "block_share": shares[arm], **intervals[arm], "above_dense": difference}
            rows.append({"task": task, "documents": len(prompts), **own})
    return rows


def _figure(trial: Trial, task: str, prompt: Prompt) -> Tensor:
    """1 if every token of an answer is the likeliest, else 0; or nats a token of text."""
    kept = trial.study.model(prompt.ids[None], use_cache=False, logits_to_keep=len(prompt.expected)).logits[0].float()
    if task == "text":
        return F.cross_entropy(kept, prompt.expected)
    return (kept.argmax(-1) == prompt.expected)[:ANSWER_TOKENS].all().float()
