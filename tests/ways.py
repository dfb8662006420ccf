"""Every way of generating of the support matrix: what a user calls, as a function that a test runs dense and sparse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from families import FAMILIES, VOCABULARY, Family, tiny
from generation import left_padded
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

PROMPT, NEW, BUFFER = 36, 6, 96
Result = tuple[Tensor, Tensor]
"""Tokens, and the logits or scores behind them."""


def prompts(length: int = PROMPT, rows: int = 2, seed: int = 0) -> Tensor:
    """Token ids [rows, length] without repetition, as far as the vocabulary goes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:length] + 3 for _ in range(rows)])


def generate(model: PreTrainedModel, ids: Tensor | None, mask: Tensor | None = None, **options: Any) -> Result:
    torch.manual_seed(5)
    if ids is not None:
        mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def step_by_step(model: PreTrainedModel, cache: Any, ids: Tensor) -> Result:
    """Greedy decoding written out: `ids` on whatever `cache` holds, then one token at a time."""
    tokens, logits = [], []
    for _ in range(NEW):
        row = model(ids, past_key_values=cache).logits[:, -1]
        ids = row.argmax(-1, keepdim=True)
        tokens.append(ids)
        logits.append(row)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def second_turn(model: PreTrainedModel) -> Result:
    """A chat: a prompt and its answer stay in the cache, the next turn comes as one forward of several tokens."""
    cache = DynamicCache(config=model.config)
    first = step_by_step(model, cache, prompts())
    second = step_by_step(model, cache, prompts(9, seed=1))
    return torch.cat([first[0], second[0]], 1), torch.cat([first[1], second[1]], 1)


def right_padded(model: PreTrainedModel) -> Result:
    """A prefill padded on the right, then decoding with each row's own positions and the padding masked."""
    lengths = torch.tensor([PROMPT, 21])
    ids, slots = prompts(), torch.arange(PROMPT)
    mask = (slots < lengths[:, None]).long()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        row = model(ids * mask, attention_mask=mask, past_key_values=cache).logits[torch.arange(2), lengths - 1]
        tokens, logits = [], []
        for step in range(NEW):
            token = row.argmax(-1, keepdim=True)
            tokens.append(token)
            logits.append(row)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            positions = (lengths + step)[:, None]
            row = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def chunked_prefill(model: PreTrainedModel) -> Result:
    """The prompt in pieces of 15, the last one ends in decoding."""
    cache, ids = DynamicCache(config=model.config), prompts()
    with torch.no_grad():
        for piece in ids[:, :30].split(15, dim=1):
            model(piece, past_key_values=cache)
    return step_by_step(model, cache, ids[:, 30:])


def quantized(model: PreTrainedModel) -> Result:
    cache = QuantizedCache("hqq", model.config, nbits=8, q_group_size=8, residual_length=4, axis_key=1, axis_value=1)
    return generate(model, prompts(), past_key_values=cache)


def offloaded(model: PreTrainedModel) -> Result:
    """Every layer but the running one away from its device; without one, what moves it has no streams to wait for."""
    streams = () if torch.cuda.is_available() else ("torch.Stream", "torch.cuda.default_stream")
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(mock.patch(stream))
        return generate(model, prompts(), cache_implementation="offloaded")


def inputs_embeds(model: PreTrainedModel) -> Result:
    embeds = model.get_input_embeddings()(prompts()).detach()
    return generate(model, None, torch.ones(embeds.shape[:2], dtype=torch.long), inputs_embeds=embeds)


def mixed_lengths(model: PreTrainedModel) -> Result:
    rows = [prompts(n, rows=1, seed=n)[0] for n in (PROMPT, 23, 11)]
    return generate(model, *left_padded(rows))


def assisted(model: PreTrainedModel) -> Result:
    """A draft model proposes, the model verifies several tokens in one forward, and the cache is cropped."""
    vocabulary = model.config.get_text_config().vocab_size
    return generate(model, prompts(rows=1), assistant_model=tiny("Llama", seed=3, vocab_size=vocabulary))


@dataclass(frozen=True)
class Way:
    """One way of generating.

    Attributes:
        name: column of the support table.
        run: what a user calls.
        boundary: multi-token forwards verify decoded tokens, so the test states where the prompt ends.
        windows: whether transformers can do it with sliding-window layers.
    """

    name: str
    run: Callable[[PreTrainedModel], Result]
    boundary: bool = False
    windows: bool = True


WAYS = {
    way.name: way
    for way in (
        Way("greedy", lambda model: generate(model, prompts())),
        Way("sampling", lambda model: generate(model, prompts(), do_sample=True, top_k=0, temperature=1.3)),
        Way("several returned", lambda m: generate(m, prompts(), do_sample=True, top_k=0, num_return_sequences=2)),
        Way("beam search", lambda model: generate(model, prompts(), num_beams=3, num_return_sequences=2)),
        Way("draft model", assisted, boundary=True),
        Way("prompt lookup", lambda m: generate(m, prompts(rows=1), prompt_lookup_num_tokens=3), boundary=True),
        Way("left padding", mixed_lengths),
        Way("right padding", right_padded),
        Way("chunked prefill", chunked_prefill),
        Way("second turn", second_turn),
        Way("inputs_embeds", inputs_embeds),
        Way("StaticCache", lambda m: generate(m, prompts(), cache_implementation="static", max_length=BUFFER)),
        Way("offloaded cache", offloaded),
        Way("QuantizedCache", quantized, windows=False),
    )
}


def possible(family: Family, way: Way) -> bool:
    """Whether transformers itself can do it: its quantized cache has no layers with a sliding window."""
    return way.windows or "sliding_window" not in family.fields or family.fields["sliding_window"] is None


def support_table() -> str:
    """The matrix that the tests run, as evals/docs/models.md shows it."""
    header = ["family", "sparse layers", *WAYS]
    rows = [[family.name, family.note, *(_mark(family, way) for way in WAYS.values())] for family in FAMILIES.values()]
    lines = [header, ["---", "---", *(":-:" for _ in WAYS)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mark(family: Family, way: Way) -> str:
    if not possible(family, way):
        return "–"
    return "✓" if family.sparse else "dense"


if __name__ == "__main__":
    print(support_table())
