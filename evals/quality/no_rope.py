"""Layers without RoPE: how far few chunks of frequency 0 get, beside the same layers with RoPE.

    python -m evals.quality.no_rope    # five minutes on one idle core

It writes evals/results/no_rope.json, and from it the table of evals/docs/models.md.
The reference model becomes a SmolLM3, two of its four layers lose RoPE, and it trains for a hundred steps, until it
finds facts again. Both models are measured on held-out text and facts: the share of the logits' variance that half and
a quarter of the chunks explain, and perplexity and exact answers with some layers sparse.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM

from evals.marked import fill
from evals.reference_model.corpus import training_text
from evals.reference_model.data import Sampler, Vocabulary
from evals.reference_model.recipe import Recipe, Stage
from evals.reference_model.score import documents
from evals.reference_model.tokenizer import encode_lines
from evals.reference_model.train import Batches, build_optimizer, losses
from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.core.criteria import explained_share
from fasa_flex.lm_eval.haystack import Document, heldout_text
from fasa_flex.saving import replace_text

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference_model"
RESULTS = ROOT / "results" / "no_rope.json"

UNROTATED = (1, 3)
LENGTH, LAST, WINDOWS, QUESTIONS = 1024, 128, 16, 50
BUDGETS = (64, 128)
MIX = (("facts", 1024, 0.4), ("facts", 512, 0.3), ("copy", 256, 0.1), ("echo", 512, 0.2))
STAGE = Stage("no rope", 1, MIX, (1e-3, 0.0))


def adapted(unrotated: tuple[int, ...], steps: int) -> tuple[SmolLM3ForCausalLM, list[float]]:
    """The reference model with these layers without RoPE after more training, and the share of right answer tokens."""
    former = LlamaForCausalLM.from_pretrained(REFERENCE)
    fields = former.config.to_dict()
    own = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    same = (*own, "num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings")
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps")
    rotates = [int(layer not in unrotated) for layer in range(former.config.num_hidden_layers)]
    model = SmolLM3ForCausalLM(
        SmolLM3Config(**{name: fields[name] for name in (*same, *special)}, no_rope_layers=rotates)
    )
    model.load_state_dict(former.state_dict())
    tokenizer, recipe = AutoTokenizer.from_pretrained(REFERENCE), Recipe(stages=(STAGE,), seed=1)
    vocabulary = Vocabulary.of(lambda text: list(tokenizer.encode(text)), recipe.vocab)
    sampler = Sampler(encode_lines(tokenizer, training_text()), vocabulary, tokenizer.bos_token_id)
    batches, optimizer = Batches(recipe, sampler, STAGE), build_optimizer(model, recipe)
    right = []
    for step in tqdm(range(steps), desc="training"):
        for group in optimizer.param_groups:
            group["lr"] = STAGE.lr[0] * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        loss = losses(model, *batches[step])
        right.append(float(loss["right"]))
        (loss["text"] + loss["answer"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), right


def explained(profile: FasaProfile, share: float) -> list[float]:
    """Share of the logits' variance that this share of the chunks explains: each layer's mean over heads."""
    assert profile.covariance is not None
    chosen = profile.dominant(round(share * len(profile.layout.chunks)), criterion="variance")
    return [float(layer) for layer in explained_share(profile.covariance, chosen).mean(1)]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: list[Tensor]) -> float:
    """Perplexity of the last tokens of each window [LENGTH], in one forward each."""
    total = 0.0
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=LAST + 1).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[-LAST:]))
    return math.exp(total / len(windows))


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: Any, asked: list[Document], fasa: Any = None) -> float:
    """Share of documents whose whole answer is written greedily, the answer's tokens sparse."""
    right = 0
    for document in asked:
        prompt, answer = tokenizer.encode(document.prompt), tokenizer.encode(document.answer)
        ids = torch.tensor([prompt + answer])
        if fasa is None:
            logits = model(input_ids=ids, use_cache=False).logits
        else:
            with fasa.sparse_from(torch.tensor([len(prompt) - 1])):
                logits = model(input_ids=ids, use_cache=False).logits
        right += logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(asked)


def measured(model: PreTrainedModel) -> dict[str, Any]:
    """Explained shares; perplexity and answers with layers 1 and 3 sparse, the others, and all."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = torch.tensor(tokenizer.encode(heldout_text()))
    windows = list(text.unfold(0, LENGTH, LENGTH)[2 : 2 + WINDOWS])
    asked = documents(tokenizer, LENGTH - 32, QUESTIONS, 8)
    samples = [text[:LENGTH], torch.tensor(tokenizer.encode(documents(tokenizer, LENGTH - 96, 1, 12)[0].prompt))]
    profile = calibrate(model, samples, progress=False)
    dense = perplexity(model, windows)
    layers = set(range(model.config.num_hidden_layers))
    rows = []
    for name, sparse in (("1 and 3", set(UNROTATED)), ("0 and 2", layers - set(UNROTATED)), ("all", layers)):
        for budget in BUDGETS:
            config = FasaConfig(n_fac=budget, dense_layers=tuple(sorted(layers - sparse)))
            with enable(model, profile, config) as fasa:
                with fasa.sparse_from(torch.tensor([LENGTH - LAST])):
                    ratio = perplexity(model, windows) / dense
                assert [n for n, each in enumerate(fasa.stats.per_layer) if each.sparse_queries] == sorted(sparse)
                rows.append({"sparse": name, "n_fac": budget, "perplexity": ratio})
                rows[-1]["answers"] = answers(model, tokenizer, asked, fasa)
    return {
        "unrotated_layers": list(profile.layout.unrotated_layers),
        "explained": {"half": explained(profile, 0.5), "quarter": explained(profile, 0.25)},
        "dense": {"perplexity": dense, "answers": answers(model, tokenizer, asked)},
        "sparse": rows,
    }


def table() -> str:
    """The two layers with and without RoPE, side by side, from the committed result."""
    result = json.loads(RESULTS.read_text())
    columns = ["half of the chunks explain", "a quarter"]
    columns += [f"perplexity, {n_fac} tokens" for n_fac in BUDGETS] + ["exact answers"]
    lines = ["| layers 1 and 3 | " + " | ".join(columns) + " |", "| --- |" + " --: |" * len(columns)]
    for title, name in (("with RoPE", "with RoPE in all layers"), ("without RoPE", "without RoPE in layers 1 and 3")):
        shares = [[result[name]["explained"][part][layer] for layer in UNROTATED] for part in ("half", "quarter")]
        cells = [" and ".join(f"{share:.0%}" for share in both) for both in shares]
        rows = [row for row in result[name]["sparse"] if row["sparse"] == "1 and 3"]
        cells += [f"{row['perplexity']:.3f}" for row in rows]
        cells.append(f"{min(row['answers'] for row in rows):.0%}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {ROOT / "docs" / "models.md": {"no rope table": table}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, right = adapted(UNROTATED, options.steps)
    result = {
        "steps": options.steps,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "right answer tokens of the last 20 steps": sum(right[-20:]) / len(right[-20:]),
        "with RoPE in all layers": measured(LlamaForCausalLM.from_pretrained(REFERENCE).eval()),
        "without RoPE in layers 1 and 3": measured(model),
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 4))
    replace_text(options.out, json.dumps(rounded, indent=1) + "\n")
    for page, tables in TABLES.items():
        fill(page, tables)


if __name__ == "__main__":
    main()
