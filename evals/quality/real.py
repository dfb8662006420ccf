"""Dense attention, FASA and rivals on a real pretrained model: perplexity of long text, needles in it.

    python -m evals.quality.real --pretrained FOLDER --gguf-file FILE --text BOOK --text BOOK --calibrate BOOK --out JSON

Settings are calibrated on some texts and reported on others. A document's prefix runs densely, once; each arm then
decodes the tail on a copy of its cache, every query of it sparse. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.expectations import cache_argument
from fasa_flex.loading import load_model

CITIES = (
    "Bremen Turin Lagos Perth Izmir Osaka Tampa Minsk Quebec Malaga Lisbon Tokyo Nairobi Oslo Cairo Lima Quito".split()
)
FIRST_TOKEN, STRIDE = 12_000, 9_000
"""Where the first window of a text begins, and how far the next one is."""


class Arm(NamedTuple):
    """One way to attend: ``config`` as fields of `FasaConfig`, None for dense; ``method`` as in `scorer_factory`."""

    config: dict[str, Any] | None
    method: str = "fasa"
    paper: bool = False


def arms_of(names: list[str], backend: str = "auto") -> dict[str, Arm]:
    """Arms by name: ``dense``; ``METHOD BUDGET key=value ...``, such as ``fasa 128 completion=none``, ``oracle 256``."""
    arms: dict[str, Arm] = {"dense": Arm(None)}
    for name in names:
        method, budget, *options = name.split()
        fields: dict[str, Any] = {"n_fac": json.loads(budget), "backend": backend}
        for option in options:
            key, _, value = option.partition("=")
            try:
                fields[key] = json.loads(value)
            except json.JSONDecodeError:
                fields[key] = value
        if "dense_layers" in fields:
            fields["dense_layers"] = tuple(fields["dense_layers"])
        arms[name] = Arm(fields, "fasa" if method == "paper" else method, method == "paper")
    return arms


class Needle(NamedTuple):
    """A prompt with its answer: token ids, tokens of the prompt, tokens of the answer."""

    ids: Tensor
    prompt: int
    answer: int


def needle(tokenizer: PreTrainedTokenizerBase, book: Tensor, length: int, seed: int, count: int = 4) -> Needle:
    """Six-digit numbers hidden in a text of ``length`` tokens; the prompt asks for one of them."""
    rng = random.Random(seed)
    start = rng.randrange(5_000, len(book) - length)
    keys = rng.sample(CITIES, count)
    values = [str(rng.randrange(100_000, 999_999)) for _ in keys]
    text, parts, last = book[start : start + length - 220], [], 0
    for place, key, value in zip(sorted(rng.sample(range(1, 20), count)), keys, values, strict=True):
        end = len(text) * place // 20
        parts += [tokenizer.decode(text[last:end]), f" The special magic number for {key} is: {value}. "]
        last = end
    wanted = rng.randrange(count)
    user = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
        f"about the numbers afterwards.\n{''.join(parts)}{tokenizer.decode(text[last:])}\n"
        f"What is the special magic number for {keys[wanted]} mentioned in the provided text?"
    )
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": user}]
        user = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        user = f"{tokenizer.bos_token or ''}{user}\nAnswer: "
    head, opening, answer = (
        tokenizer(part, add_special_tokens=False).input_ids
        for part in (user, f"The special magic number for {keys[wanted]} is:", f" {values[wanted]}")
    )
    return Needle(torch.tensor(head + opening + answer), len(head), len(answer))


def read_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> Tensor:
    """A text's token ids, single line breaks as spaces, without its first 20,000 characters."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text(errors="replace"))[20_000:]
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase, books: list[Tensor], length: int, start: Tensor
) -> list[Tensor]:
    """Three stretches of text and three needle prompts up to where the answer begins."""
    rng = random.Random(1)
    texts = [torch.cat([start, rng.choice(books)[1_000 * i :][: length - len(start)]]) for i in (3, 4, 5)]
    prompts = [needle(tokenizer, rng.choice(books), length, seed=77 + i) for i in range(3)]
    return texts + [prompt.ids[: len(prompt.ids) - prompt.answer] for prompt in prompts]


class Evaluation:
    """A model, its profile and arms, and what they scored."""

    def __init__(
        self, model: PreTrainedModel, profile: FasaProfile, arms: dict[str, Arm], results: dict[str, Any]
    ) -> None:
        self.model, self.profile, self.arms, self.results = model, profile, arms, results
        self.share: dict[str, float] = results.setdefault("bytes_read_share", {})

    @torch.no_grad()
    def tails(self, ids: Tensor, prefix: int) -> Iterator[tuple[str, Tensor]]:
        """Each arm's logits [tail, vocabulary] behind a dense prefix."""
        ids = ids[None].to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        self.model(ids[:, :prefix], logits_to_keep=1, **cache_argument(self.model, cache))
        start = torch.tensor([prefix])
        for arm, (fields, method, paper) in self.arms.items():
            copied = cache_argument(self.model, copy.deepcopy(cache))
            if fields is None:
                yield arm, self.model(ids[:, prefix:], **copied).logits[0]
                continue
            config = FasaConfig.paper(**fields) if paper else FasaConfig(**fields)
            scorer = None
            if method != "fasa":
                scorer = scorer_factory(method, self.profile, per=config.per)  # type: ignore[arg-type]  # a name from the command line, checked there
            with enable(self.model, self.profile, config, scorer=scorer) as fasa, fasa.sparse_from(start):
                logits = self.model(ids[:, prefix:], **copied).logits[0]
                self.share[f"{arm} @ {ids.shape[1]}"] = fasa.stats.kv_bytes_share
            yield arm, logits

    def window(self, ids: Tensor, tail: int) -> dict[str, float]:
        """Each arm's mean negative log-likelihood of a window's tail, in nats a token."""
        targets = ids[-tail + 1 :].to(self.model.device)
        return {
            arm: cross_entropy(logits[:-1].float(), targets).item() for arm, logits in self.tails(ids, len(ids) - tail)
        }

    def needle(self, prompt: Needle) -> dict[str, bool]:
        """Whether each arm writes the answer."""
        targets = prompt.ids[-prompt.answer :].to(self.model.device)
        return {
            arm: bool((logits[-prompt.answer - 1 : -1].argmax(-1) == targets).all())
            for arm, logits in self.tails(prompt.ids, prompt.prompt)
        }


def summary(results: dict[str, Any]) -> list[str]:
    """A line an arm: perplexity over dense with its standard error, needles found by length."""
    lines = []
    for arm in results["arms"]:
        line = f"{arm:44s}"
        differences = torch.tensor([w[arm] - w["dense"] for w in results["windows"].values() if arm in w])
        if len(differences) > 1:
            error = differences.std() / len(differences) ** 0.5
            line += f" ppl x{math.exp(differences.mean()):.4f} +-{error:.4f} ({len(differences)})"
        found: dict[int, list[bool]] = {}
        for key, hits in results["needles"].items():
            if arm in hits:
                found.setdefault(int(key.split("/")[0]), []).append(hits[arm])
        lines.append(line + "".join(f"  {length}: {sum(f)}/{len(f)}" for length, f in sorted(found.items())))
    return lines


def main() -> None:
    """Evaluate, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of the model")
    parser.add_argument("--gguf-file", help="file in the folder")
    parser.add_argument("--text", action="append", type=Path, required=True, help="a text to report on; repeatable")
    parser.add_argument(
        "--calibrate", action="append", type=Path, required=True, help="a text to calibrate on; repeatable"
    )
    parser.add_argument("--arm", action="append", default=[], help="such as 'fasa 128 completion=none'; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--tail", type=int, default=512, help="of these, sparse")
    parser.add_argument("--prompts", type=int, default=100, help="needle prompts of each length")
    parser.add_argument("--lengths", default="1024,2048,4096,7680", help="tokens of a needle prompt")
    parser.add_argument("--calibration-length", type=int, default=4096)
    parser.add_argument("--profile", type=Path, help="folder where the profile is kept")
    parser.add_argument("--backend", default="auto", help="of the sparse arms")
    parser.add_argument("--bos", action="store_true", help="windows begin with the model's first token")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so many")
    options = parser.parse_args()
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.pretrained, gguf_file=options.gguf_file, dtype=torch.float32, device=device)
    books = {path.stem: read_tokens(tokenizer, path) for path in {*options.text, *options.calibrate}}
    first = torch.tensor([tokenizer.bos_token_id] if options.bos else [], dtype=torch.long)
    if options.profile and (options.profile / "config.json").exists():
        profile = FasaProfile.from_pretrained(options.profile)
    else:
        own = [books[path.stem] for path in options.calibrate]
        profile = calibrate(model, calibration_samples(tokenizer, own, options.calibration_length, first))
        if options.profile:
            profile.save_pretrained(options.profile)
    print(f"calibrated after {time.monotonic() - began:.0f} s", flush=True)
    arms = arms_of(options.arm, options.backend)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for key in ("windows", "needles"):
        results.setdefault(key, {})
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in {*options.text, *options.calibrate}}
    results |= {
        "model": options.gguf_file or options.pretrained,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": profile.provenance.versions,
        "texts": hashes,
        "reported_on": [path.name for path in options.text],
        "calibrated_on": [path.name for path in options.calibrate],
        "window": {"length": options.length, "tail": options.tail},
        "arms": {name: None if arm.config is None else arm._asdict() for name, arm in arms.items()},
    }
    evaluation = Evaluation(model, profile, arms, results)
    names = [path.stem for path in options.text]
    jobs: list[tuple[int, str, int, int]] = []  # order, kind, number, length
    lengths = [int(length) for length in options.lengths.split(",")]
    for number in range(max(options.windows, options.prompts)):
        if number < options.windows:
            jobs.append(
                (number * max(1, options.prompts // max(1, options.windows)), "windows", number, options.length)
            )
        if number < options.prompts:
            jobs += [(number, "needles", number, length) for length in lengths]
    for done, (_, kind, number, length) in enumerate(sorted(jobs, key=lambda job: job[0])):
        key = f"{length}/{number}"
        if set(arms) <= set(results[kind].get(key, ())):
            continue
        if time.monotonic() - began > options.seconds:
            print(f"stopped at {done} of {len(jobs)}")
            break
        book = books[names[number % len(names)]]
        if kind == "windows":
            at = FIRST_TOKEN + STRIDE * (number // len(names))
            window = torch.cat([first, book[at : at + length - len(first)]])
            scored: dict[str, Any] = dict(evaluation.window(window, options.tail))
        else:
            scored = dict(evaluation.needle(needle(tokenizer, book, length, seed=1_000 * length + number)))
        results[kind].setdefault(key, {}).update(scored)
        if done % 20 == 0:
            options.out.write_text(json.dumps(results, indent=1))
            print(f"{done} of {len(jobs)} after {time.monotonic() - began:.0f} s", flush=True)
    results["seconds"] = results.get("seconds", 0.0) + time.monotonic() - began
    options.out.write_text(json.dumps(results, indent=1))
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
