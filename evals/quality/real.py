r"""Dense attention, FASA and rivals on a real pretrained model: perplexity of long text, needles in it.

    python -m evals.quality.real --pretrained FOLDER --gguf-file FILE --text BOOK --text BOOK --calibrate BOOK \
        --profile FOLDER --arm "fasa 128" --arm "paper 256" --arm "fasa 128 completion=none" --out JSON

Calibrated on some texts and reported on others, books of 20,000 tokens and more. A document's prefix runs densely,
once; each arm then decodes the tail on a copy of its cache, every query of it sparse. Started again, with more arms
perhaps, it measures what the file does not hold.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from evals.quality.arms import provenance
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.expectations import cache_argument
from fasa_flex.handle import Fasa
from fasa_flex.loading import load_model
from fasa_flex.saving import replace_text

CITIES = ["Bremen", "Turin", "Lagos", "Perth", "Izmir", "Osaka", "Tampa", "Minsk", "Quebec", "Malaga", "Lisbon"]
CITIES += ["Tokyo", "Nairobi", "Oslo", "Cairo", "Lima", "Quito"]
FIRST_TOKEN, STRIDE = 12_000, 9_000
"""Where the first window of a text begins, and how far the next one is."""


class Arm(NamedTuple):
    """One way to attend: its config, None for dense; ``method`` as in `scorer_factory`, or ``fasa``."""

    config: FasaConfig | None
    method: str = "fasa"

    def record(self) -> dict[str, Any] | None:
        """All of it, JSON-ready."""
        return self.config and {"method": self.method, "config": json.loads(json.dumps(self.config.to_dict()))}


def arms_of(names: Iterable[str], backend: str = "auto") -> dict[str, Arm]:
    """Arms by name: ``dense``, then each ``METHOD BUDGET key=value ...``, such as ``oracle 256 completion=none``."""
    arms = {"dense": Arm(None)}
    for name in names:
        method, budget, *options = name.split()
        fields: dict[str, Any] = {"n_fac": json.loads(budget), "backend": backend}
        for option in options:
            key, _, value = option.partition("=")
            try:
                fields[key] = json.loads(value)
            except json.JSONDecodeError:
                fields[key] = value
        config = FasaConfig.paper(**fields) if method == "paper" else FasaConfig(**fields)
        arms[name] = Arm(config, "fasa" if method == "paper" else method)
    return arms


class Document(NamedTuple):
    """Token ids, of which ``prefix`` run densely and the last ``scored`` are scored; kind and name in the results."""

    kind: str
    name: str
    ids: Tensor
    prefix: int
    scored: int


def needle(
    tokenizer: PreTrainedTokenizerBase, book: Tensor, length: int, seed: int, name: str = "", count: int = 4
) -> Document:
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
    return Document("needles", name, torch.tensor(head + opening + answer), len(head), len(answer))


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
    return texts + [prompt.ids[: len(prompt.ids) - prompt.scored] for prompt in prompts]


class Evaluation:
    """A model, its profile and arms, and what they scored."""

    def __init__(
        self, model: PreTrainedModel, profile: FasaProfile, arms: dict[str, Arm], results: dict[str, Any]
    ) -> None:
        self.model, self.profile, self.arms, self.results = model, profile, arms, results

    def lacks(self, kind: str, name: str) -> set[str]:
        """The arms that a document has no score of."""
        return self.arms.keys() - self.results[kind].get(name, {}).keys()

    @torch.no_grad()
    def score(self, documents: list[Document]) -> None:
        """Score each document by the arms that it lacks.

        Nats a token of a window's tail, or whether a needle was found (1 or 0).
        """
        caches = []
        for document in documents:
            cache = DynamicCache(config=self.model.config)
            ids = document.ids[None, : document.prefix].to(self.model.device)
            self.model(ids, logits_to_keep=1, **cache_argument(self.model, cache))
            caches.append(cache)
        for name, arm in self.arms.items():
            todo = [pair for pair in zip(documents, caches, strict=True) if name in self.lacks(*pair[0][:2])]
            with self._enabled(arm) if todo else nullcontext() as fasa:
                for document, cache in todo:
                    score = self._tail(name, document, cache, fasa)
                    self.results[document.kind].setdefault(document.name, {})[name] = score

    def _enabled(self, arm: Arm) -> AbstractContextManager[Fasa | None]:
        if arm.config is None:
            return nullcontext()
        scorer = None
        if arm.method != "fasa":
            scorer = scorer_factory(arm.method, self.profile, per=arm.config.per)
        return enable(self.model, self.profile, arm.config, scorer=scorer)

    def _tail(self, arm: str, document: Document, cache: DynamicCache, fasa: Fasa | None) -> float:
        ids, prefix, scored = document.ids[None].to(self.model.device), document.prefix, document.scored
        copied = cache_argument(self.model, copy.deepcopy(cache))
        with nullcontext() if fasa is None else fasa.sparse_from(torch.tensor([prefix])):
            logits = self.model(ids[:, prefix:], **copied).logits[0, -scored - 1 : -1].float()
        if fasa is not None:
            self.results["bytes_read_share"][f"{arm} @ {ids.shape[1] // 100 * 100}"] = fasa.stats.kv_bytes_share
            fasa.stats.reset()
        targets = ids[0, -scored:]
        if document.kind == "windows":
            return cross_entropy(logits, targets).item()
        return float((logits.argmax(-1) == targets).all())


def opened(path: Path, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The results in the file, or empty ones; exits where the file's are of other settings or of another such arm."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for key, value in settings.items():
        if results.get(key, value) != value:
            sys.exit(f"{path} holds results of another {key} ({results[key]} and not {value}); choose another --out.")
    for name, arm in arms.items():
        known, own = results.setdefault("arms", {}).setdefault(name, arm.record()), arm.record()
        if known and own and not known["config"].items() <= own["config"].items():
            sys.exit(f"{path} holds results of {name!r} with other options or defaults; choose another --out.")
        results["arms"][name] = own
    return {"windows": {}, "needles": {}, "bytes_read_share": {}, "seconds": 0.0, **results, **settings}


def summary(results: dict[str, Any]) -> list[str]:
    """A line an arm: perplexity over dense with its standard error, needles found by length."""
    lines = []
    for arm in results["arms"]:
        line = f"{arm:44s}"
        differences = torch.tensor([w[arm] - w["dense"] for w in results["windows"].values() if arm in w])
        if len(differences) > 1:
            error = differences.std() / len(differences) ** 0.5
            line += f" ppl x{math.exp(differences.mean()):.4f} +-{error:.4f} ({len(differences)})"
        found: dict[int, list[float]] = {}
        for key, hits in results["needles"].items():
            if arm in hits:
                found.setdefault(int(key.split("/")[0]), []).append(hits[arm])
        lines.append(line + "".join(f"  {length}: {sum(f):.0f}/{len(f)}" for length, f in sorted(found.items())))
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
    parser.add_argument("--together", type=int, default=4, help="documents whose caches are held at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so many")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Calibrate, measure what the file does not hold, and keep every document's results at once."""
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.pretrained, gguf_file=options.gguf_file, dtype=torch.float32, device=device)
    paths = dict.fromkeys((*options.text, *options.calibrate))
    books = {path: read_tokens(tokenizer, path) for path in paths}
    first = torch.tensor([tokenizer.bos_token_id] if options.bos else [], dtype=torch.long)
    if options.profile and (options.profile / "config.json").exists():
        profile = FasaProfile.from_pretrained(options.profile)
    else:
        own = [books[path] for path in options.calibrate]
        profile = calibrate(model, calibration_samples(tokenizer, own, options.calibration_length, first))
        if options.profile:
            profile.save_pretrained(options.profile)
    print(f"calibrated after {time.monotonic() - began:.0f} s", flush=True)
    arms = arms_of(options.arm, options.backend)
    settings = {
        "texts": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
        "reported_on": [path.name for path in options.text],
        "calibrated_on": [path.name for path in options.calibrate],
        "window": {"length": options.length, "tail": options.tail},
        "profile": profile.fingerprint,
    }
    results = opened(options.out, settings, arms)
    results |= {
        **provenance(time.time()),
        "model": options.gguf_file or Path(options.pretrained).name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": results["seconds"],
    }
    evaluation = Evaluation(model, profile, arms, results)

    def document(kind: str, number: int, length: int) -> Document:
        path, name = options.text[number % len(options.text)], f"{length}/{number}"
        if kind == "needles":
            return needle(tokenizer, books[path], length, seed=1_000 * length + number, name=name)
        at = FIRST_TOKEN + STRIDE * (number // len(options.text))
        ids = torch.cat([first, books[path][at:]])[:length]
        if len(ids) < length:
            sys.exit(f"{path} ends before window {number}; pass a longer text or fewer --windows.")
        return Document(kind, name, ids, length - options.tail, options.tail - 1)

    lengths = [int(length) for length in options.lengths.split(",")]
    wanted = [("windows", number, options.length) for number in range(options.windows)]
    wanted += [("needles", number, length) for number in range(options.prompts) for length in lengths]
    todo = [job for job in wanted if evaluation.lacks(job[0], f"{job[2]}/{job[1]}")]
    for at in range(0, len(todo), options.together):
        begun = time.monotonic()
        if begun - began > options.seconds:
            print(f"stopped with {len(todo) - at} of {len(todo)} documents left")
            break
        evaluation.score([document(*job) for job in todo[at : at + options.together]])
        results["seconds"] = round(results["seconds"] + time.monotonic() - begun, 1)
        replace_text(options.out, json.dumps(results, indent=1) + "\n")
        print(f"{at + 1} of {len(todo)} after {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
