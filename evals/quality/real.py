r"""Dense attention, FASA and baselines on a pretrained model: perplexity of long texts, and needles.

    python -m evals.quality.real --pretrained FOLDER --gguf-file FILE --text BOOK --text BOOK --calibrate BOOK \
        --profile FOLDER --arms study --processes 8 --out JSON
    python -m evals.quality.real --pretrained FOLDER --text topics --calibrate topics --profile FOLDER \
        --arm "fasa 128" --arm "paper 256" --arm "fasa 128 completion=none" --out JSON

The model is calibrated on some texts and evaluated on others: books of at least 20,000 tokens, or the topics of
Python's language reference. A document's prefix runs densely, once; each arm then decodes the tail on a copy of its
cache, with all queries sparse (methods that evict also see the prefix). A second start, also with more arms, measures
what is missing in the file. Several processes can share the documents on one GPU; each writes its own file, and the
files are joined.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention

from evals.quality.arms import provenance
from evals.quality.real_arms import SETS, Lengths, Reach, arms_of
from evals.quality.real_documents import Documents, calibration_samples, read_text
from evals.quality.real_processes import Job, divided, shard_file
from evals.quality.real_results import joined, opened, summary
from evals.quality.real_scores import Evaluation
from fasa_flex import FasaProfile, calibrate
from fasa_flex.baselines import channel_weights
from fasa_flex.hf.loading import load_model
from fasa_flex.hf.model_structure import attention_modules, dense_layers
from fasa_flex.hf.probe import check_attention
from fasa_flex.saving import replace_text

SHARE = " --processes=1 --shard"
"""The last arguments of a process that `share_documents` starts."""


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """The options, also of `evals.quality.real_heads`."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pretrained", required=True, help="folder of the model")
    options.add_argument("--gguf-file", help="file in the folder")
    options.add_argument("--tokenizer", help="folder of the tokenizer, where it is not the model's own")
    options.add_argument("--text", action="append", required=True, help="a file to evaluate, or topics; repeatable")
    options.add_argument("--calibrate", action="append", required=True, help="a file to calibrate on, or topics")
    options.add_argument("--arm", action="append", default=[], help="such as 'fasa 128 completion=none'; repeatable")
    options.add_argument("--arms", choices=SETS, help="a named set of arms")
    options.add_argument("--out", type=Path, required=True, help="JSON file of results")
    options.add_argument("--windows", type=int, default=30, help="windows of each length")
    options.add_argument("--length", default="8192", help="tokens of a window; several as 1024,8192")
    options.add_argument("--tail", type=int, default=512, help="sparse tokens of a window, at most half of them")
    options.add_argument("--prompts", type=int, default=100, help="needle prompts of each length")
    options.add_argument("--lengths", default="1024,2048,4096,7680", help="tokens of a needle prompt")
    options.add_argument("--calibration-length", type=int, default=4096)
    options.add_argument("--profile", type=Path, help="folder of the profile; needed with --processes")
    options.add_argument("--backend", default="auto", help="backend of the sparse arms")
    options.add_argument("--bos", action="store_true", help="windows begin with the model's first token")
    options.add_argument(
        "--together", type=int, default=8, help="documents scored at one time; their caches must fit in memory"
    )
    options.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after these seconds")
    options.add_argument("--processes", type=int, default=1, help="processes that share the documents")
    options.add_argument("--shard", help=argparse.SUPPRESS)
    return options


class Run:
    """The loaded model, texts, profile and arms of a run, and its settings, by which results are identified."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":  # float32 with enable_gqa=True takes PyTorch's kernel that stores all T x T scores
            sdpa_attention.use_gqa_in_sdpa = lambda *_: False
        self.model, self.tokenizer = load_model(
            options.pretrained,
            gguf_file=options.gguf_file,
            tokenizer=options.tokenizer,
            dtype=torch.float32,
            device=self.device,
        )
        self.texts = [read_text(self.tokenizer, source, calibrates=False) for source in options.text]
        calibrating = [read_text(self.tokenizer, source, calibrates=True) for source in options.calibrate]
        start = torch.tensor([self.tokenizer.bos_token_id] if options.bos else [], dtype=torch.long)
        own = [text.ids for text in calibrating]
        self.samples = calibration_samples(self.tokenizer, own, options.calibration_length, start)
        self.profile = self._profile(options.profile)
        self.documents = Documents(self.tokenizer, self.texts, options.tail, start)
        windows, needles = (
            tuple(int(length) for length in text.split(",") if length) for text in (options.length, options.lengths)
        )
        self.lengths = Lengths(windows, needles)
        layers = sorted(attention_modules(self.model))
        unserved = self.profile.layout.unserved_layers
        self.dense_layers = dense_layers(self.model, (), unserved, check_attention(self.model))
        able = [layer for layer in layers if layer not in self.dense_layers]
        reaches = SETS[options.arms](able) if options.arms else {}
        reaches |= {name: Reach() for name in options.arm}
        self.arms = arms_of(reaches, options.backend, layers)
        self.settings = {
            "texts": {text.name: text.sha256 for text in (*self.texts, *calibrating)},
            "reported_on": [text.name for text in self.texts],
            "calibrated_on": [text.name for text in calibrating],
            "window": {"length": windows[0] if len(windows) == 1 else list(windows), "tail": options.tail},
            "profile": self.profile.fingerprint,
        }

    @functools.cache  # noqa: B019 - one run a process
    def channels(self) -> Tensor:
        """`channel_weights` of the calibration samples, for Double Sparsity."""
        return channel_weights(self.model, self.samples)

    def _profile(self, folder: Path | None) -> FasaProfile:
        if folder and (folder / "config.json").exists():
            return FasaProfile.from_pretrained(folder)
        profile = calibrate(self.model, self.samples)
        if folder:
            profile.save_pretrained(folder)
        return profile

    def jobs(self, windows: int, prompts: int) -> list[Job]:
        """All documents, first those of most arms; exits if the texts are shorter than a window."""
        held = {length: self.documents.windows(length, windows) for length in self.lengths.windows}
        for length, count in held.items():
            if not count and windows:
                names = ", ".join(text.name for text in self.texts)
                sys.exit(f"{names} have no window of {length} tokens; pass a longer text or a smaller --length.")
            if count < windows:
                print(f"the texts hold {count} of {windows} windows of {length} tokens whose tails do not meet")
        jobs: list[Job] = [("windows", n, i, windows) for n, count in held.items() for i in range(count)]
        jobs += [("needles", length, i, prompts) for i in range(prompts) for length in self.lengths.needles]
        chosen = {kind: self.lengths.chosen(kind) for kind in ("windows", "needles")}
        return sorted(jobs, key=lambda job: (job[1] not in chosen[job[0]], job[0] == "needles", job[2]))


def run(options: argparse.Namespace) -> None:
    """Calibrate, measure what is missing in the file, and write every document's results at once."""
    began = time.monotonic()
    if options.processes > 1:
        share_documents(options)
        return
    loaded = Run(options)
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    number, of = map(int, options.shard.split("/")) if options.shard else (0, 1)
    out = shard_file(options.out, number, of) if options.shard else options.out
    all_jobs = loaded.jobs(options.windows, options.prompts)
    jobs, arms = divided(all_jobs, loaded.arms, loaded.lengths, number, of)
    results = opened(out if out.exists() else options.out, loaded.settings, arms)
    made = provenance(time.time())
    results |= {
        **made,
        "command": made["command"].partition(SHARE)[0],
        "model": options.gguf_file or Path(options.pretrained).name,
        "device": torch.cuda.get_device_name() if loaded.device == "cuda" else "cpu",
        "seconds": results["seconds"],
    }
    evaluation = Evaluation(loaded.model, loaded.profile, arms, results, loaded.lengths, loaded.channels)
    todo = [job for job in jobs if evaluation.lacks(job[0], f"{job[1]}/{job[2]}")]
    for at in range(0, len(todo), options.together):
        begun = time.monotonic()
        if begun - began > options.seconds:
            print(f"stopped with {len(todo) - at} of {len(todo)} documents left")
            break
        evaluation.score([loaded.documents.make(*job) for job in todo[at : at + options.together]])
        results["seconds"] = round(results["seconds"] + time.monotonic() - begun, 1)
        replace_text(out, json.dumps(results, indent=1) + "\n")
        done = min(at + options.together, len(todo))
        print(f"{options.shard or ''} {done} of {len(todo)} after {time.monotonic() - began:.0f} s", flush=True)
    replace_text(out, json.dumps(results, indent=1) + "\n")
    if not options.shard:
        print("\n".join(summary(results)))


def share_documents(options: argparse.Namespace) -> None:
    """Measure in several processes of this command, and join their files."""
    if options.profile is None:
        sys.exit("--processes needs --profile, a folder for the profile that all of them read.")
    begun, of = time.monotonic(), options.processes
    loaded = None if (options.profile / "config.json").exists() else Run(options)
    command = [sys.executable, "-m", "evals.quality.real", *sys.argv[1:]]
    started = [subprocess.Popen([*command, *f"{SHARE}={number}/{of}".split()]) for number in range(of)]
    loaded = loaded or Run(options)  # beside them
    failed = [process.args for process in started if process.wait()]
    files = [shard_file(options.out, i, of) for i in range(of)]
    held = [file for file in (options.out, *files) if file.exists()]
    parts = [opened(file, loaded.settings, loaded.arms) for file in held]
    if parts:
        whole = joined(parts)
        before = json.loads(options.out.read_text())["seconds"] if options.out.exists() else 0.0
        whole |= {"seconds": round(before + time.monotonic() - begun, 1), "processes": of}
        replace_text(options.out, json.dumps(whole, indent=1) + "\n")
        print("\n".join(summary(whole)))
    if failed:
        sys.exit(f"{len(failed)} of {of} processes failed; run the same command again, which continues their results.")
    for file in files:
        file.unlink()


if __name__ == "__main__":
    run(parser().parse_args())
