"""Make the large reference model: train it, pack it in eight bits, score the packed weights.

    python -m evals.reference_model.make_large --text text.txt --out large --device cuda --minutes 6.5

Writes to ``--out`` the shards of the weights and ``beside.tar`` with the small files of
``evals/reference_model_large``, the training log and the scores; it is first written without scores, so that the
weights are safe before scoring. The training run, its checkpoint and the unpacked model are in ``--work``; a second
start with the same folder continues the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import time
from pathlib import Path

import torch

from evals.reference_model import eight_bits
from evals.reference_model.recipe import RECIPES, Recipe
from evals.reference_model.score import scores, show
from evals.reference_model.train import Run, prepare
from fasa_flex.bench.record import command_line
from fasa_flex.saving import replace_text

BUNDLE = "beside.tar"
LOG, SCORES = "log.jsonl", "scores.json"


def make(
    recipe: Recipe, text: str, work: Path, out: Path, device: torch.device, minutes: float | None, questions: int
) -> None:
    """Train, pack, and score the packed weights.

    Args:
        recipe: the model's recipe.
        text: the training text.
        work: folder of the run, of the packed and of the unpacked model.
        out: folder of the results.
        device: device of training and scoring.
        minutes: most minutes of training.
        questions: number of questions for each length and number of facts.
    """
    begun = time.monotonic()

    def say(done: str) -> None:
        print(f"{done} after {time.monotonic() - begun:.0f} s", flush=True)

    sampler = prepare(recipe, text, work)
    say("text prepared")
    Run(recipe, sampler, work, device, minutes).train()
    say("trained")
    packed, unpacked = work / "packed", work / "unpacked"
    eight_bits.pack(work, packed)
    shutil.copyfile(work / LOG, packed / LOG)
    deliver(packed, out)
    say("packed")
    eight_bits.unpack(packed, unpacked)
    command = command_line("evals.reference_model.make_large")
    found = {"command": command, **scores(unpacked, questions, device)}
    replace_text(packed / SCORES, json.dumps(found, indent=2) + "\n")
    deliver(packed, out)
    show(found)
    say("scored")


def deliver(packed: Path, out: Path) -> None:
    """Copy the shards of a packed folder, and its other files as one tar file."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / BUNDLE, "w") as bundle:
        for path in sorted(packed.iterdir()):
            if path.suffix == ".safetensors":
                shutil.copyfile(path, out / path.name)
            else:
                bundle.add(path, path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="file to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/large"), help="folder of the run (default: runs/large)")
    parser.add_argument("--recipe", choices=RECIPES, default="large")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="most minutes of training")
    parser.add_argument("--questions", type=int, default=200, help="questions for each length and number of facts")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    device = torch.device(args.device)
    make(RECIPES[args.recipe], text, args.work, args.out, device, args.minutes, args.questions)


if __name__ == "__main__":
    main()
