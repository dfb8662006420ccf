"""``fasa-flex generate``: continue a prompt under FASA and, for comparison, under dense attention."""

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
    """One generated answer.

    Attributes:
        ids: int64 [n], token ids.
        text: the decoded text.
        prefill: seconds until the first token.
        decode: seconds for the other tokens.
        attended: share of valid keys that sparse queries attended to; None: no query was sparse.
    """

    ids: Tensor
    text: str
    prefill: float
    decode: float
    attended: float | None

    @property
    def rate(self) -> float:
        """Tokens a second after the first token; 0 if there is only one."""
        return (len(self.ids) - 1) / self.decode if self.decode else 0.0


class _Clock(TextStreamer):
    """A streamer that records the time of every token, and prints the text if ``shows``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shows: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shows, self.times = shows, list[float]()

    def put(self, value: Tensor) -> None:
        """Record the time of the prompt or of a token."""
        super().put(value.cpu())
        self.times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that later tokens cannot change."""
        if self.shows:
            print(text, end="\n" if stream_end else "", flush=True)


def encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, chat: bool
) -> Tensor:
    """A prompt as token ids [1, n] on the model's device.

    Args:
        model: the model.
        tokenizer: the model's.
        prompt: the text.
        new_tokens: tokens to generate.
        chat: put the prompt into the chat template as a user's message.

    Raises:
        ValueError: the prompt is empty or too long, or the tokenizer has no chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    limit = maximum_positions(model)
    if not ids.shape[1]:
        raise ValueError("the prompt is empty; name a file with text.")
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and {new_tokens} are to follow, but the model takes {limit}; "
            "shorten the prompt or lower --max-new-tokens."
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
        model: a model without FASA enabled.
        tokenizer: the model's.
        ids: int64 [1, n], the prompt.
        max_new_tokens: most tokens to generate.
        shows: print the text while it is generated.
        config: FASA's config; None: dense attention.
        profile: the model's profile; None: calibrate on the prompt.
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
    first, last = clock.times[1], clock.times[-1]  # times[0] is the prompt's
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
    """Print FASA's answer while it is generated, and its times; with ``compare`` also dense attention's answer."""
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)  # keeps one-off initialisation out of both times
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
    """Times and shares as a Markdown table."""
    rows = ["| attention | tokens | first token [s] | tokens a second | keys attended |", "|---|---|---|---|---|"]
    for name, answer in answers.items():
        share = "all" if answer.attended is None else f"{100 * answer.attended:.1f} %"
        rows.append(f"| {name} | {len(answer.ids)} | {answer.prefill:.2f} | {answer.rate:.1f} | {share} |")
    return "\n".join(rows)


def agreement(one: Tensor, other: Tensor) -> str:
    """A sentence on how many first tokens two answers, token ids [n] and [m], have in common."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    if not len(differs):
        same = len(one) == len(other)
        return f"Both write the same {shorter} tokens{'' if same else ', and one goes on'}."
    return f"Both write the same {int(differs[0])} tokens, then they part."


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns, of ``width`` characters in total."""
    column = max(16, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = []
    for name, text in texts.items():
        lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, column) or [""]]
        columns.append([name, "-" * column, *lines])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{cell:{column}}" for cell in row).rstrip() for row in rows)


def _width() -> int:
    return min(160, shutil.get_terminal_size((120, 24)).columns)
