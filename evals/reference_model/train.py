"""Train the reference model: copying first, then facts, then facts in text at growing lengths.

``python -m evals.reference_model.train --out runs/reference`` takes about an hour and a half on two cores. Every batch
is a function of the seed and the step: an interrupted run goes on where it was when started with the same ``--out``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from evals.reference_model.corpus import training_text
from evals.reference_model.data import ANSWER, TEXT, Sampler, Vocabulary
from evals.reference_model.recipe import RECIPE, Recipe, Stage
from evals.reference_model.tokenizer import encode_lines, train_tokenizer

REPORT = 50
"""Steps between two reports; checkpoints are written at a report only, so that a resumed run repeats nothing."""

PROGRESS = ("step", "tokens", "stage", "used", "seconds", "work")
"""The numbers of a run that a checkpoint keeps."""


def build_model(recipe: Recipe, max_length: int = 4608) -> LlamaForCausalLM:
    """A freshly initialised Llama."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab,
            hidden_size=recipe.width,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=max_length,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; only the layers' matrices decay."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def losses(model: LlamaForCausalLM, ids: torch.Tensor, roles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean loss over text tokens (0 if there are none) and over answer tokens, and the share of right answer tokens.

    Args:
        ids, roles: [rows, length].
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
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
    """A training run that lives in a folder: ``checkpoint.pt``, ``log.jsonl`` and, once finished, the model.

    Args:
        recipe: What to train.
        sampler: Where the sequences come from.
        out: The run's folder; an existing checkpoint in it is continued.
        device: Where to train.
    """

    def __init__(self, recipe: Recipe, sampler: Sampler, out: Path, device: torch.device) -> None:
        self.recipe, self.sampler, self.out, self.device = recipe, sampler, out, device
        self.model = build_model(recipe).to(device)
        self.optimizer = build_optimizer(self.model, recipe)
        self.step = self.tokens = self.stage = self.used = 0
        self.seconds = self.work = 0.0
        self.saved = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """The file that holds everything needed to go on."""
        return self.out / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """One line of JSON for each report."""
        return self.out / "log.jsonl"

    def train(self) -> None:
        """Run every stage that is left, then write the model."""
        while self.stage < len(self.recipe.stages):
            self._train_stage(self.recipe.stages[self.stage])
            self.stage, self.used = self.stage + 1, 0
            self._save()
        self.model.save_pretrained(self.out)

    def _train_stage(self, stage: Stage) -> None:
        recent: list[dict[str, float]] = []
        while self.used < stage.tokens:
            recent.append(self._train_step(stage))
            if self.step % REPORT == 0:
                row = self._report(stage, recent)
                if stage.until and len(recent) == REPORT and row["right"] >= stage.until:
                    return
                if time.monotonic() - self.saved > 300:
                    self._save()
                recent = []

    def _train_step(self, stage: Stage) -> dict[str, float]:
        begun = time.monotonic()
        rng = np.random.default_rng([self.recipe.seed, self.step])
        shares = np.array([share for _, _, share in stage.mix])
        kind, length, _ = stage.mix[rng.choice(len(shares), p=shares / shares.sum())]
        batch = self.sampler.batch(rng, kind, max(1, self.recipe.batch_tokens // length), length)
        ids, roles = (torch.from_numpy(array).to(self.device) for array in batch)
        lr = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * self.used / stage.tokens
        lr *= min(1.0, (self.step + 1) / self.recipe.warmup)
        loss = losses(self.model, ids, roles)
        (loss["text"] + loss["answer"]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        row = {name: value.item() for name, value in loss.items()}
        self.step, self.used, self.tokens = self.step + 1, self.used + ids.numel(), self.tokens + ids.numel()
        self.work += ids.numel() * _cost(length)
        self.seconds += time.monotonic() - begun
        return row | {"lr": lr}

    def _report(self, stage: Stage, recent: list[dict[str, float]]) -> dict[str, Any]:
        left = stage.tokens - self.used, *(later.tokens for later in self.recipe.stages[self.stage + 1 :])
        costs = [_stage_cost(later) for later in self.recipe.stages[self.stage :]]
        eta = sum(n * cost for n, cost in zip(left, costs, strict=True)) * self.seconds / self.work
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

    def _save(self) -> None:
        state = {
            "recipe": repr(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
        self.saved = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device)
        if state["recipe"] != repr(self.recipe):
            raise ValueError(f"{self.checkpoint} was made by another recipe: choose another --out or remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        rows = self.log.read_text().splitlines(keepends=True)
        self.log.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.step))
        print(f"continuing at step {self.step}", flush=True)


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    return round(sum(row[name] for row in rows) / len(rows), 4) if rows else None


def _cost(length: int) -> float:
    """Time of a token relative to one in a very short sequence; measured on a CPU, used for the ETA only."""
    return 1 + length / 1300


def _stage_cost(stage: Stage) -> float:
    return sum(share * _cost(length) for _, length, share in stage.mix) / sum(share for _, _, share in stage.mix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; continued if it has a checkpoint")
    parser.add_argument("--text", type=Path, help="train on this file, not on the running Python's library")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = args.text.read_text(encoding="utf-8") if args.text else training_text()
    tokenizer = train_tokenizer(text, RECIPE.vocab)
    vocabulary = Vocabulary.of(tokenizer.encode, RECIPE.vocab)
    print(f"training text: {len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}", flush=True)
    sampler = Sampler(encode_lines(tokenizer, text), vocabulary, tokenizer.bos_token_id)
    tokenizer.save_pretrained(args.out)
    Run(RECIPE, sampler, args.out, torch.device(args.device)).train()


if __name__ == "__main__":
    main()
