r"""Greedy answers of 500 tokens under dense and sparse attention: first differing token, likelihood under dense.

    python -m evals.quality.long_generation --pretrained FOLDER --gguf-file FILE --profile FOLDER \
        --text BOOK --text BOOK

Half of the prompts are texts to continue, half are questions about a text in the chat template. Dense attention scores
each arm's answer in one forward; the arms' answers are compared with its own.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.quality.arms import RESULTS, PartLedger, provenance
from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.hf.loading import load_model

ARMS: dict[str, FasaConfig | None] = {
    "dense": None,
    "fasa 256": FasaConfig(n_fac=256),
    "fasa 128": FasaConfig(n_fac=128),
    "paper 256": FasaConfig.paper(n_fac=256),
}
"""Config by arm; None: dense attention, which comes first, since the others are compared with its text."""
REQUEST = "\n\nRetell the passage above in your own words, in detail and in the order in which things happen."


class Prompt(NamedTuple):
    """Token ids int64 [n], the name of their text, and whether it is continued or asked about."""

    kind: str
    text: str
    ids: Tensor


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], count: int, shortest: int, longest: int
) -> list[Prompt]:
    """Passages of ``shortest`` to ``longest`` tokens; texts and kinds alternate.

    Raises:
        ValueError: a text is shorter than a prompt.
    """
    ids = {
        name: tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for name, text in texts.items()
    }
    names, prompts = list(texts), []
    for number in range(count):
        name, length = names[number % len(names)], shortest + (longest - shortest) * number // max(1, count - 1)
        own, turns = ids[name], -(-count // len(names))
        start = (len(own) - length) * (number // len(names)) // turns
        if start < 0:
            raise ValueError(f"{name} has {len(own)} tokens, a prompt needs {length}; pass a longer text.")
        stretch = own[start : start + length]
        if number % 2:
            message = {"role": "user", "content": tokenizer.decode(stretch[: length - 64]) + REQUEST}
            chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            stretch = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids[0]
        prompts.append(Prompt("chat" if number % 2 else "text", name, stretch))
    return prompts


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Sequence[Tensor], tokens: int, pad: int) -> list[Tensor]:
    """The model's greedy answers: up to ``tokens`` token ids each, with the end token if there is one.

    Args:
        model: the model, dense or with FASA enabled.
        prompts: int64 [n] each; run as one batch, padded on the left.
        tokens: most tokens of an answer.
        pad: token id of padding.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    written = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=pad,
        cache_implementation="dynamic",  # the answers of the uncompiled model, dense or sparse
    )[:, width:].cpu()
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()
    kept = []
    for row in written:
        end = torch.isin(row, ends).nonzero()
        kept.append(row[: int(end[0]) + 1] if len(end) else row)
    return kept


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: Tensor, written: Tensor) -> Tensor:
    """The logits that predict each written token: float32 [n, V]."""
    ids = torch.cat([prompt, written])[None].to(model.device)
    logits: Tensor = model(ids, logits_to_keep=len(written) + 1, use_cache=False).logits[0, :-1]
    return logits.float().cpu()


def first_divergence(own: Tensor, dense: Tensor) -> int | None:
    """Index of the first token that differs; None if none does."""
    shared = min(len(own), len(dense))
    differing = (own[:shared] != dense[:shared]).nonzero()
    if len(differing):
        return int(differing[0])
    return None if len(own) == len(dense) else shared


def row_of(prompt: Prompt, own: Tensor, logits: Tensor, dense: Tensor, dense_logits: Tensor) -> dict[str, Any]:
    """The row of an answer in the results.

    Args:
        prompt: its prompt.
        own: the answer's token ids.
        logits: dense attention's logits of each of its tokens.
        dense: dense attention's answer.
        dense_logits: dense attention's logits of its own answer.
    """
    at = first_divergence(own, dense)
    margin = None
    if at is not None and at < min(len(own), len(dense)):
        margin = round(float(dense_logits[at, dense[at]] - dense_logits[at, own[at]]), 4)
    found = logits.log_softmax(-1).gather(1, own[:, None])
    fours = own.unfold(0, 4, 1) if len(own) >= 4 else own[None]
    return {
        "kind": prompt.kind,
        "text": prompt.text,
        "prompt_tokens": len(prompt.ids),
        "prompt": hashlib.sha256(prompt.ids.numpy().tobytes()).hexdigest(),
        "tokens": len(own),
        "first_divergence": at,
        "margin": margin,
        "log_likelihood": round(float(found.mean()), 5),
        "distinct_fours": round(len(torch.unique(fours, dim=0)) / len(fours), 4),
        "written": " ".join(map(str, own.tolist())),
    }


def answers(part: dict[str, Any]) -> list[Tensor]:
    """The token ids of a part's rows."""
    return [torch.tensor([int(token) for token in row["written"].split()]) for row in part["rows"]]


def measure(
    model: PreTrainedModel,
    profile: FasaProfile,
    arm: str,
    prompts: Sequence[Prompt],
    tokens: int,
    pad: int,
    dense: Sequence[Tensor] | None,
) -> list[dict[str, Any]]:
    """An arm's rows for some prompts.

    Args:
        model: the model without FASA.
        profile: its profile.
        arm: a name in `ARMS`.
        prompts: prompts of one batch.
        tokens: most tokens of an answer.
        pad: token id of padding.
        dense: dense attention's answers; None if the arm is dense.
    """
    config, ids = ARMS[arm], [prompt.ids for prompt in prompts]
    if config is None:
        written = generate(model, ids, tokens, pad)
    else:
        with enable(model, profile, config) as fasa:
            written = generate(model, ids, tokens, pad)
            if not fasa.stats.sparse_queries:
                raise ValueError(f"{arm} had no sparse query, so its answers are dense; use longer prompts.")
    rows = []
    for number, (prompt, own) in enumerate(zip(prompts, written, strict=True)):
        logits = logits_of(model, prompt.ids, own)
        theirs = own if dense is None else dense[number]
        rows.append(
            row_of(prompt, own, logits, theirs, logits if dense is None else logits_of(model, prompt.ids, theirs))
        )
    return rows


def main() -> None:
    """Generate the answers, and print the first differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of the model")
    parser.add_argument("--gguf-file", help="file in the folder")
    parser.add_argument("--profile", type=Path, required=True, help="folder of its profile, the same for all arms")
    parser.add_argument("--text", action="append", type=Path, default=[], help="repeatable; default: Python's manual")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shortest", type=int, default=1500, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=7500, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="prompts run together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "long_generation.json", help="default: %(default)s")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_model(options.pretrained, gguf_file=options.gguf_file, dtype=torch.float32)
    profile = FasaProfile.from_pretrained(options.profile)
    texts = {path.name: path.read_text(errors="replace")[20_000:] for path in options.text}
    texts = texts or {"pydoc_data.topics": "\n\n".join(topics[name] for name in sorted(topics))}
    prompts = prompts_of(tokenizer, texts, options.prompts, options.shortest, options.longest)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    ledger = PartLedger(options.out, {**provenance(time.time()), "device": device})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    shared = {
        "model": options.gguf_file or Path(options.pretrained).name,
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "tokens": options.tokens,
    }
    for at in range(0, len(prompts), options.batch):
        batch = prompts[at : at + options.batch]
        for arm, config in ARMS.items():
            name = f"{arm}/{at}"
            dense = None if config is None else answers(ledger.parts[f"dense/{at}"])
            own = {} if config is None else {"config": config.to_dict(), "profile": profile.fingerprint}
            asked = [hashlib.sha256(prompt.ids.numpy().tobytes()).hexdigest() for prompt in batch]
            begun = time.time()
            rows = ledger.part(
                name,
                {**shared, **own, "prompts": asked},
                lambda arm=arm, dense=dense, batch=batch: measure(
                    model, profile, arm, batch, options.tokens, pad, dense
                ),
            )
            found = sum(row["log_likelihood"] for row in rows) / len(rows)
            print(f"{name}: {found:.3f} nats a token, {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
