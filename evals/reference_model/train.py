"""Train a reference model: copying first, then facts, then facts in text at growing lengths.

``python -m evals.reference_model.train --out runs/reference`` takes about an hour and a half on two cores;
``--recipe large`` needs an accelerator. Every batch depends on the seed and the step only; a second start with the same
``--out`` continues an interrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from evals.reference_model.corpus import training_text
from evals.reference_model.data import ANSWER, TEXT, Sampler, Vocabulary
from evals.reference_model.recipe import RECIPES, Recipe, Stage
from evals.reference_model.tokenizer import encode_lines, train_tokenizer
from fasa_flex.saving import replace_text, replacing

REPORT = 50
"""Steps between two reports; checkpoints are written at reports only, so that a continued run repeats no report."""

PROGRESS = ("step", "tokens", "stage", "used", "seconds", "work")
"""The counters of a run that a checkpoint stores."""


LINEAR_MEMORY = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Attention kernels on CUDA; a machine without them fails at the first step instead of running out of memory at 8192
tokens."""

LENGTH_COST = {"cpu": 1300, "cuda": 13_000}
"""Length of a sequence in which a token takes twice as long as in a very short one; measured on CPU, estimated on CUDA.
"""


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The batches of a stage, indexed by the run's step: ids and roles, both [rows, length]."""

    def __init__(self, recipe: Recipe, sampler: Sampler, stage: Stage) -> None:
        self.recipe, self.sampler, self.stage = recipe, sampler, stage

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.seed, step])
        shares = np.array([share for _, _, share in self.stage.mix])
        kind, length, _ = self.stage.mix[rng.choice(len(shares), p=shares / shares.sum())]
        ids, roles = self.sampler.batch(rng, kind, max(1, self.recipe.batch_tokens // length), length)
        if self.recipe.text_share < 1:
            roles = self.sampler.silence(rng, roles, self.recipe.text_share)
        return torch.from_numpy(ids), torch.from_numpy(roles)

    def since(self, step: int) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """All batches from a step on; the recipe's workers draw them ahead."""
        return DataLoader(
            self, batch_size=None, sampler=itertools.count(step), num_workers=self.recipe.workers,
            prefetch_factor=4 if self.recipe.workers else None,
        )  # fmt: skip


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A freshly initialised Llama."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab,
            hidden_size=recipe.width,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=64,
            max_position_embeddings=recipe.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay on the layers' matrices only."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def losses(model: LlamaForCausalLM, ids: torch.Tensor, roles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean loss over text tokens (0 if there are none) and over answer tokens, and the share of right answer tokens.

    Args:
        ids, roles: [rows, length].
    """
    linear_memory = sdpa_kernel(LINEAR_MEMORY) if ids.device.type == "cuda" else nullcontext()
    with torch.autocast(ids.device.type, torch.bfloat16), linear_memory:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    target, role = ids[:, 1:].flatten(), roles[:, 1:].flatten()
    loss = F.cross_entropy(logits, target, reduction="none")
    text, answer = role == TEXT, role == ANSWER
    return {
        "text": (loss * text).sum() / text.sum().clamp(min=1),
        "answer": (loss * answer).sum() / answer.sum().clamp(min=1),
        "right": ((logits.argmax(-1) == target) & answer).sum() / answer.sum().clamp(min=1),
    }


class Run:
    """A training run in a folder: ``checkpoint.pt``, ``log.jsonl`` and, once finished, the model.

    Args:
        recipe: the recipe.
        sampler: draws the sequences.
        out: folder of the run; a checkpoint in it is continued.
        device: device of training.
        minutes: most minutes of the run over all starts. If needed, stages are shortened, all by the same share of
            their tokens, and learning rates still reach their ends; stages with ``until`` are not shortened.
    """

    def __init__(
        self, recipe: Recipe, sampler: Sampler, out: Path, device: torch.device, minutes: float | None = None
    ) -> None:
        self.recipe, self.sampler, self.out, self.device = recipe, sampler, out, device
        self.limit = math.inf if minutes is None else 60 * minutes
        self.model = build_model(recipe).to(device)
        self.optimizer = build_optimizer(self.model, recipe)
        self.step = self.tokens = self.stage = self.used = 0
        self.seconds = self.work = 0.0
        self.saved = self.clock = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """The file from which the run can be continued."""
        return self.out / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """One line of JSON for each report."""
        return self.out / "log.jsonl"

    def train(self) -> None:
        """Run the remaining stages, then write the model."""
        while self.stage < len(self.recipe.stages):
            self._train_stage(self.recipe.stages[self.stage])
            self.stage, self.used = self.stage + 1, 0
            self._save()
        self.model.save_pretrained(self.out)

    def _train_stage(self, stage: Stage) -> None:
        recent: list[dict[str, float]] = []
        used, begun, end = self.used, self.seconds, self._end_of(stage)
        batches = iter(Batches(self.recipe, self.sampler, stage).since(self.step))
        while self.used < stage.tokens:
            recent.append(self._train_step(stage, *next(batches)))
            if end < math.inf:
                passed = (self.seconds - begun) / max(end - begun, 1e-9)
                self.used = max(self.used, used + math.ceil(passed * (stage.tokens - used)))
            if self.step % REPORT == 0:
                row = self._report(stage, recent)
                if stage.until and len(recent) == REPORT and row["right"] >= stage.until:
                    return
                if time.monotonic() - self.saved > 300:
                    self._save()
                recent = []

    def _end_of(self, stage: Stage) -> float:
        """The second of the run at which this stage must end, by its share of the remaining time."""
        if stage.until or self.limit == math.inf or self.used >= stage.tokens:
            return math.inf
        costs = self._costs_left()
        return self.seconds + max(0.0, self.limit - self.seconds) * costs[0] / sum(costs)

    def _train_step(self, stage: Stage, ids: torch.Tensor, roles: torch.Tensor) -> dict[str, float]:
        lr = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * self.used / stage.tokens
        lr *= min(1.0, (self.step + 1) / self.recipe.warmup)
        loss = losses(self.model, ids.to(self.device), roles.to(self.device))
        (loss["text"] + loss["answer"]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        row = {name: value.item() for name, value in loss.items()}
        self.step, self.used, self.tokens = self.step + 1, self.used + ids.numel(), self.tokens + ids.numel()
        self.work += ids.numel() * self._cost(ids.shape[1])
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return row | {"lr": lr}

    def _report(self, stage: Stage, recent: list[dict[str, float]]) -> dict[str, Any]:
        eta = min(sum(self._costs_left()) * self.seconds / self.work, self.limit - self.seconds)
        row = {
            "stage": stage.name,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "lr": recent[-1]["lr"],
            "text": _mean([row for row in recent if row["text"]], "text"),
            "answer": _mean(recent, "answer"),
            "right": _mean(recent, "right"),
        }
        with self.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(
            f"{stage.name:>6}  step {self.step}  {self.tokens / 1e6:.2f}M tokens  text loss {row['text'] or 0:.3f}  "
            f"answer loss {row['answer']:.3f}  right {row['right']:.3f}  "
            f"{self.tokens / self.seconds:.0f} tokens/s  {self.seconds / 60:.0f} min, {eta / 60:.0f} min to go",
            flush=True,
        )
        return row

    def _costs_left(self) -> list[float]:
        """Remaining cost of this stage and of each later one, in tokens of a very short sequence."""
        stages = self.recipe.stages[self.stage :]
        left = stages[0].tokens - self.used, *(later.tokens for later in stages[1:])
        return [n * self._stage_cost(stage) for n, stage in zip(left, stages, strict=True)]

    def _stage_cost(self, stage: Stage) -> float:
        total = sum(share for _, _, share in stage.mix)
        return sum(share * self._cost(length) for _, length, share in stage.mix) / total

    def _cost(self, length: int) -> float:
        """Time of a token relative to one in a very short sequence, for the ETA and the stages' shares of the time."""
        return 1 + length / LENGTH_COST[self.device.type]

    def _save(self) -> None:
        state = {
            "recipe": repr(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        with replacing(self.checkpoint.parent) as beside:
            torch.save(state, beside / self.checkpoint.name)
        self.saved = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device)
        if state["recipe"] != repr(self.recipe):
            raise ValueError(f"{self.checkpoint} was made by another recipe; choose another --out or remove it.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        rows = self.log.read_text().splitlines(keepends=True)
        replace_text(self.log, "".join(row for row in rows if json.loads(row)["step"] <= self.step))
        print(f"continuing at step {self.step}", flush=True)


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    return round(sum(row[name] for row in rows) / len(rows), 4) if rows else None


def prepare(recipe: Recipe, text: str, out: Path) -> Sampler:
    """Train the tokenizer, save it to ``out``, and tokenise the text."""
    tokenizer = train_tokenizer(text, recipe.vocab, recipe.max_length)
    vocabulary = Vocabulary.of(tokenizer.encode, recipe.vocab)
    print(f"training text: {len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}", flush=True)
    tokenizer.save_pretrained(out)
    return Sampler(encode_lines(tokenizer, text), vocabulary, tokenizer.bos_token_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; continued if it has a checkpoint")
    parser.add_argument("--recipe", choices=RECIPES, default="small")
    parser.add_argument("--minutes", type=float, help="most minutes; uses fewer tokens if needed")
    parser.add_argument("--text", type=Path, help="training text (default: the running Python's library)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = args.text.read_text(encoding="utf-8") if args.text else training_text()
    recipe = RECIPES[args.recipe]
    Run(recipe, prepare(recipe, text, args.out), args.out, torch.device(args.device), args.minutes).train()


if __name__ == "__main__":
    main()
