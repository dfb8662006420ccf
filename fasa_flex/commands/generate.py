"""``fasa-flex generate``: a model writes on from a prompt under FASA, and dense attention beside it."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import FasaConfig
from fasa_flex.hf.model_structure import maximum_positions
from fasa_flex.model.enable import enable


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: int64 [n], its tokens.
        text: what they say.
        prefill: seconds until the first of them.
        decode: seconds for the others.
        attended: share of their keys that sparse queries attended to; None: no query was sparse.
    """

    ids: Tensor
    text: str
    prefill: float
    decode: float
    attended: float | None

    @property
    def rate(self) -> float:
        """Tokens a second behind the first; 0 where there is no other."""
        return (len(self.ids) - 1) / self.decode if self.decode else 0.0


class _Clock(TextStreamer):
    """Prints text as it comes, or nothing, and takes the time of every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shows: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shows, self.times = shows, list[float]()

    def put(self, value: Tensor) -> None:
        """Take the prompt, or a token."""
        super().put(value.cpu())
        self.times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is certain."""
        if self.shows:
            print(text, end="\n" if stream_end else "", flush=True)


def encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, room: int, chat: bool) -> Tensor:
    """A prompt as token ids [1, n] on the model's device.

    Args:
        model: that continues it.
        tokenizer: the model's.
        prompt: the text.
        room: tokens to be written behind it.
        chat: whether it is a user's message, to be put into the chat template.

    Raises:
        ValueError: it is empty or too long, or there is no chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    limit = maximum_positions(model)
    if not ids.shape[1]:
        raise ValueError("the prompt is empty; name a file with a text.")
    if limit is not None and ids.shape[1] + room > limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and {room} are to follow, the model takes {limit}; shorten the "
            "prompt or lower --max-new-tokens."
        )
    return ids.to(model.device)


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    *,
    shows: bool,
    config: FasaConfig | None = None,
    profile: FasaProfile | None = None,
) -> Written:
    """Continue a prompt greedily.

    Args:
        model: not under FASA.
        tokenizer: the model's.
        ids: int64 [1, n], the prompt.
        max_new_tokens: at most.
        shows: whether the text is printed as it comes.
        config: of FASA; None: dense attention.
        profile: the model's; None: it calibrates itself on the prompt.
    """
    clock = _Clock(tokenizer, shows)
    fasa = None if config is None else enable(model, profile, config)
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    try:
        begun = time.perf_counter()
        full = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=clock, **greedy
        )
    finally:
        if fasa is not None:
            fasa.disable()
    answer = full[0, ids.shape[1] :].cpu()
    first, last = clock.times[1], clock.times[-1]  # the prompt comes before
    attended = fasa.stats.kv_share if fasa is not None and fasa.stats.sparse_queries else None
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Written(answer, text, first - begun, last - first, attended)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    config: FasaConfig,
    profile: FasaProfile | None,
    compare: bool,
) -> None:
    """Print an answer under FASA as it comes, and what it took; with ``compare``, dense attention's beside it."""
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)  # what the first forward sets up is nobody's time
    answers = {"fasa": write(model, tokenizer, ids, max_new_tokens, shows=True, config=config, profile=profile)}
    if compare:
        print("fasa-flex: the same with dense attention ...", file=sys.stderr)
        answers["dense"] = write(model, tokenizer, ids, max_new_tokens, shows=False)
        print("\n" + side_by_side({name: answer.text for name, answer in answers.items()}, _width()))
        print("\n" + agreement(answers["fasa"].ids, answers["dense"].ids))
    print("\n" + table(answers))
    if answers["fasa"].attended is None:
        print(
            f"fasa-flex: no query was sparse, this is dense attention: the {ids.shape[1]} tokens of the prompt are "
            "within the budget, or too few to calibrate on (128) where no --profile is given.",
            file=sys.stderr,
        )


def table(answers: dict[str, Written]) -> str:
    """Times and shares in Markdown."""
    rows = ["| attention | tokens | first token [s] | tokens a second | keys attended |", "|---|---|---|---|---|"]
    for name, answer in answers.items():
        share = "all" if answer.attended is None else f"{100 * answer.attended:.1f} %"
        rows.append(f"| {name} | {len(answer.ids)} | {answer.prefill:.2f} | {answer.rate:.1f} | {share} |")
    return "\n".join(rows)


def agreement(one: Tensor, other: Tensor) -> str:
    """Where two answers part, token ids [n] and [m], in a sentence."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    if not len(differs):
        same = len(one) == len(other)
        return f"Both write the same {shorter} tokens{'' if same else ', and one goes on'}."
    return f"Both write the same {int(differs[0])} tokens, then they part."


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns, wrapped to ``width`` characters together."""
    column = max(16, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = []
    for name, text in texts.items():
        lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, column) or [""]]
        columns.append([name, "-" * column, *lines])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{cell:{column}}" for cell in row).rstrip() for row in rows)


def _width() -> int:
    return min(160, shutil.get_terminal_size((120, 24)).columns)
