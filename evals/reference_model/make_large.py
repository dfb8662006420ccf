"""Make the large reference model in one go: train it, pack it in eight bits, score what was packed.

    python -m evals.reference_model.make_large --text text.txt --out large --device cuda --minutes 6.5

Leaves in ``--out`` the shards of the weights and ``beside.tar`` with all the small files of
``evals/reference_model_large``, the log of the training and the scores: first without scores, so that weights are
safe before anything is measured. The run itself, its checkpoint and the unpacked model stay in ``--work``; started
again with the same one, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tarfile
import time
from pathlib import Path

import torch

from evals.reference_model import eight_bits
from evals.reference_model.recipe import RECIPES, Recipe
from evals.reference_model.score import scores, show
from evals.reference_model.train import Run, prepare
from fasa_flex.saving import replace_text

BUNDLE = "beside.tar"
LOG, SCORES = "log.jsonl", "scores.json"


def make(
    recipe: Recipe, text: str, work: Path, out: Path, device: torch.device, minutes: float | None, questions: int
) -> None:
    """Train, pack, and score what was packed.

    Args:
        recipe: of the model.
        text: to train on.
        work: folder of the run; the packed and the unpacked model become folders in it.
        out: folder of what is kept.
        device: where to train and to score.
        minutes: most that training may take.
        questions: for each length and number of facts.
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
    command = shlex.join(["python", "-m", "evals.reference_model.make_large", *map(_nameless, sys.argv[1:])])
    found = {"command": command, **scores(unpacked, questions, device)}
    replace_text(packed / SCORES, json.dumps(found, indent=2) + "\n")
    deliver(packed, out)
    show(found)
    say("scored")


def deliver(packed: Path, out: Path) -> None:
    """Copy the shards of a packed folder, and its other files as one."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / BUNDLE, "w") as bundle:
        for path in sorted(packed.iterdir()):
            if path.suffix == ".safetensors":
                shutil.copyfile(path, out / path.name)
            else:
                bundle.add(path, path.name)


def _nameless(word: str) -> str:
    """A word of the command line with no folder of this machine in it."""
    return Path(word).name if Path(word).is_absolute() else word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="file to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--work", type=Path, default=Path("runs/large"), help="folder of the run (default: runs/large)")
    parser.add_argument("--recipe", choices=RECIPES, default="large")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="most that training may take")
    parser.add_argument("--questions", type=int, default=200, help="for each length and number of facts")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    device = torch.device(args.device)
    make(RECIPES[args.recipe], text, args.work, args.out, device, args.minutes, args.questions)


if __name__ == "__main__":
    main()
