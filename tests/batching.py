"""Continuous batching on tiny models: its config in every release, and answers of requests together and alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

PAGE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
"""Name of the number of tokens in a block: since transformers 5.18, and before."""

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1)


def batching(page: int = 16, blocks: int = 60, tokens: int = 64, **options: Any) -> ContinuousBatchingConfig:
    """A config: tokens in a block, blocks in the cache, and most tokens of a forward."""
    return ContinuousBatchingConfig(**{PAGE: page}, num_blocks=blocks, max_batch_tokens=tokens, **options)


def together(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int = 12, returned: int = 1, **options: Any
) -> list[list[int]]:
    """New tokens of every request, answered by one manager."""
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, num_return_sequences=returned)
    results = model.generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=generation,
        continuous_batching_config=batching(**options),
        progress_bar=False,
    )
    assert all(result.error is None for result in results.values()), [result.error for result in results.values()]
    return [result.generated_tokens for result in results.values()]


def alone(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int = 12) -> list[list[int]]:
    """New tokens of every request by `generate`, one after another."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers
