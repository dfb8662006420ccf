r"""RULER's tasks that need no network, by the command ``lm_eval``: dense attention, defaults, and the paper's settings.

    python -m evals.quality.ruler --pretrained FOLDER --gguf-file FILE --profile FOLDER --processes 6

Every arm and task is one ``lm_eval`` command (`command`) in its own process, since RULER draws from global generators.
Each result is written at once; a second start measures what is missing in the file. Several machines can share the work
by ``--arms`` or ``--tasks`` with their own files; ``--join FILE`` adds the results of another file. Needs lm-eval's
extra ``ruler``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from evals.quality.arms import RESULTS, PartLedger, provenance
from evals.quality.ruler_arms import ARMS, MADE, SHORTEST, TASKS, Model, Questions, command
from fasa_flex import FasaProfile
from fasa_flex.report.compare import Run


def rows_of(run: Run, task: str, arm: str, asked: Questions) -> list[dict[str, Any]]:
    """A row for each length: every document's score, and one hash of all prompts.

    Raises:
        ValueError: another number of documents than requested, or a sparse arm without sparse queries.
    """
    account = run.account.get("tasks", {}).get(task, {})
    if ARMS[arm] is not None and not account.get("sparse_queries"):
        raise ValueError(f"{arm} had no sparse query in {task}, so its scores are dense; use longer prompts.")
    rows = []
    for place, length in enumerate(asked.lengths):
        scores = run.scores.get((task, str(length)), {})
        wanted = [str(MADE * place + number) for number in range(asked.documents)]
        if set(scores) != set(wanted):
            raise ValueError(
                f"{task} has {len(scores)} scores at {length} tokens, but {asked.documents} were requested; "
                f"choose lengths for which RULER makes its {MADE} documents."
            )
        prompts = "".join(run.prompts[task][document] for document in wanted)
        rows.append(
            {
                "length": length,
                "scores": [round(scores[document], 4) for document in wanted],
                "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
                **{name: account.get(name) for name in ("sparse_queries", "kv_share", "kv_bytes_share")},
            }
        )
    return rows


def check_prompts(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse arms with different prompts.

    Raises:
        ValueError: with the first such task and length.
    """
    seen: dict[tuple[str, int], tuple[str, str]] = {}
    for name, part in parts.items():
        arm, task = name.split("/")
        for row in part["rows"]:
            other, prompts = seen.setdefault((task, row["length"]), (arm, row["prompts"]))
            if prompts != row["prompts"]:
                raise ValueError(
                    f"{arm} and {other} had different prompts of {task} at {row['length']} tokens; run both with the "
                    "same versions, tokenizer and lengths."
                )


class Runner:
    """Runs commands, several at a time, and writes their results."""

    def __init__(self, model: Model, asked: Questions, ledger: PartLedger, folder: Path, device: str) -> None:
        self.model, self.asked, self.ledger, self.folder, self.device = model, asked, ledger, folder, device
        self.fingerprint = FasaProfile.from_pretrained(model.profile).fingerprint

    def settings(self, arm: str, task: str) -> dict[str, Any]:
        """Everything that decides a part's rows; of folders only the names."""
        own = self.model.arguments(arm) | {"pretrained": Path(self.model.pretrained).name}
        if "profile" in own:
            own["profile"] = self.fingerprint
        questions = dataclasses.asdict(self.asked) | {"lengths": list(self.asked.lengths)}
        return {"model_args": own, "task": task, **questions}

    def run(self, arms: Sequence[str], tasks: Sequence[str], processes: int, seconds: float) -> list[str]:
        """Measure what is missing in the ledger; returns the failed parts with their reasons.

        Args:
            arms: names in `ARMS`.
            tasks: names in `TASKS`.
            processes: number of processes at one time.
            seconds: time after which no part starts.
        """
        begun, failed = time.monotonic(), []
        jobs = [(arm, task) for task in tasks for arm in arms]
        todo = [job for job in jobs if self.ledger.kept("/".join(job), self.settings(*job)) is None]
        print(f"{len(jobs) - len(todo)} of {len(jobs)} parts are in the file", flush=True)
        with ThreadPoolExecutor(processes) as pool:
            running = {pool.submit(self._measure, *job, begun + seconds): job for job in todo}
            for number, future in enumerate(as_completed(running), 1):
                name = "/".join(running[future])
                try:
                    took, rows = future.result()
                except (ValueError, RuntimeError) as error:
                    failed.append(f"{name}: {error}")
                    print(failed[-1], flush=True)
                    continue
                self.ledger.keep(name, self.settings(*running[future]), took, rows)
                means = ", ".join(f"{row['length']}: {sum(row['scores']) / len(row['scores']):.3f}" for row in rows)
                print(f"{number}/{len(todo)} {name} ({took:.0f} s) {means}", flush=True)
        return failed

    def _measure(self, arm: str, task: str, until: float) -> tuple[float, list[dict[str, Any]]]:
        if time.monotonic() > until:
            raise RuntimeError("not begun, --seconds are over")
        begun = time.time()
        output = self.folder / arm.replace(" ", "_") / task
        paths = (str(self.folder / "tokenizer"), str(output))
        samples = json.dumps(self.asked.samples(task))
        words = command(self.model, self.asked, arm, task, samples, *paths, self.device)
        # works without the installed entry point `lm_eval`
        done = subprocess.run(
            [sys.executable, "-m", "fasa_flex.lm_eval", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"lm_eval {shlex.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return time.time() - begun, rows_of(Run.load(output), task, arm, self.asked)


def take_over(ledger: PartLedger, paths: Iterable[Path]) -> None:
    """Add the parts of other files to the ledger."""
    for path in paths:
        for name, part in json.loads(path.read_text())["parts"].items():
            ledger.keep(name, part["settings"], part["seconds"], part["rows"])


def main() -> None:
    """Run the arms and print their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of the model")
    parser.add_argument("--gguf-file", help="file in the folder")
    parser.add_argument("--profile", required=True, help="folder of its profile, the same for all arms")
    parser.add_argument("--lengths", default="2048,4096,8000", help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=100, help="documents of each length (default: %(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=25, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the model (default: %(default)s)")
    parser.add_argument("--no-chat", action="store_true", help="use no chat template")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="commands at one time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after these seconds")
    parser.add_argument("--join", action="append", type=Path, default=[], help="add the parts of a file; repeatable")
    parser.add_argument("--out", type=Path, default=RESULTS / "ruler_smollm2.json", help="default: %(default)s")
    options = parser.parse_args()
    arms, tasks = options.arms.split(","), options.tasks.split(",")
    for name, known in (*((arm, ARMS) for arm in arms), *((task, TASKS) for task in tasks)):
        if name not in known:
            parser.error(f"{name!r} is not one of {', '.join(known)}")
    lengths = tuple(int(length) for length in options.lengths.split(","))
    asked = Questions(lengths, options.documents, options.batch, chat=not options.no_chat)
    if min(lengths) < SHORTEST:
        parser.error(f"--lengths must be at least {SHORTEST}: ruler_vt finds no end with less, got {min(lengths)}")
    if not 0 < asked.documents <= MADE:
        parser.error(f"--documents must lie in 1 to {MADE}, got {asked.documents}")
    model = Model(options.pretrained, options.gguf_file, options.profile, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
        AutoTokenizer.from_pretrained(model.pretrained, **source).save_pretrained(f"{folder}/tokenizer")
        shown = Model(Path(model.pretrained).name, model.gguf_file, Path(model.profile).name, model.dtype)
        places = ("TASK", "SAMPLES", "TOKENIZER", "OUTPUT", options.device)
        device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
        head = {
            **provenance(time.time()),
            "device": device,
            "commands": {arm: "lm_eval " + shlex.join(command(shown, asked, arm, *places)) for arm in ARMS},
            "samples": f"the first {asked.documents} of each length's {MADE}",
        }
        ledger = PartLedger(options.out, head)
        take_over(ledger, options.join)
        failed = Runner(model, asked, ledger, Path(folder), options.device).run(
            arms, tasks, options.processes, options.seconds
        )
    check_prompts(ledger.parts)
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
