"""The recipes, as far as they can be tried without a network: settings, task names, prompts and scores on stub data.

The stubs have the columns that the real data sets have; a language model that knows the answers must score 1. Tasks
whose own requirements are not installed are left out with a message (``pip install "lm-eval[longbench,ruler]"``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

RECIPES = Path(__file__).parents[2] / "evals" / "quality" / "recipes"
LM_EVAL_TASKS = Path(sys.modules["lm_eval"].__file__ or "").parent / "tasks"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))

LONG = "A sentence of the context. " * 20
LONGBENCH = {
    "question": "What is it?",
    "input": "What is it?",
    "context": LONG,
    "answers": ["Paragraph 3"],
    "length": 100,
    "dataset": "stub",
    "language": "en",
    "all_classes": ["Paragraph 3", "Paragraph 12"],
    "_id": "0",
}
ROWS: dict[str, dict[str, Any]] = {
    "Xnhyacinth/LongBench": LONGBENCH,
    "recursal/longbench-v2": {"context": LONG, "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2},
    "RMT-team/babilong-1k-samples": {"input": LONG, "question": "Where is John?", "target": "kitchen"},
    "xinrongzhang2022/InfiniteBench": {
        "id": 0,
        "context": LONG,
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": ["71432", "2", "3", "4"],
    },
    "openai/gsm8k": {"question": "How many are 40 and 2?", "answer": "They are 42.\n#### 42"},
    "HuggingFaceH4/MATH-500": {
        "problem": "Halve 1.",
        "solution": r"It is $\boxed{\frac{1}{2}}$.",
        "answer": r"\frac{1}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/0.json",
    },
    "Maxwell-Jia/AIME_2024": {"ID": "2024-I-1", "Problem": "Find it.", "Solution": "So 204.", "Answer": 204},
    "math-ai/aime25": {"id": "0", "problem": "Find it.", "answer": "70"},
    "EleutherAI/wikitext_document_level": {"page": " = Title = \n Some words , and others . \n" * 300},
}
SUBSETS: dict[str, dict[str, Any]] = {"passage_count": {"answers": ["3"]}}  # what differs by the name of a subset
WRITTEN: dict[str, str] = {  # what a model that knows writes, by how the task's name begins
    "longbench_passage_count": "3",
    "longbench": "Paragraph 3",
    "babilong": "The most recent location of John is kitchen.",
    "infinitebench_longbook_choice": "A",
    "infinitebench": "71432",
    "gsm8k": "40 + 2 = 42. The final answer is 42",
    "fasa_math500": r"Half of one is \boxed{1/2}.",
    "fasa_aime24": r"... $x = 3$, hence \boxed{204}.",
    "fasa_aime25": r"so that \boxed{70}",
}


class AnySplit(dict[str, datasets.Dataset]):
    """A data set with the same rows under whatever name a task asks for."""

    def __init__(self, rows: datasets.Dataset) -> None:
        super().__init__(train=rows)
        self.rows = rows

    def __missing__(self, split: str) -> datasets.Dataset:
        return self.rows


class Knowing(LM):
    """Writes what `WRITTEN` says, and prefers the third of four letters."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        names = [request.task_name or "" for request in requests]
        return [next(text for name, text in WRITTEN.items() if task.startswith(name)) for task in names]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-1.0 if request.args[1].strip() == "C" else -2.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return [-1.0 for _ in requests]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
        rows = datasets.Dataset.from_list([{**ROWS[path], **SUBSETS.get(name or "", {})}] * 12)
        return rows if split else AnySplit(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def recipe(checkpoint: Path) -> Callable[[str], EvaluatorConfig]:
    """As ``lm_eval --config RECIPE --model_args pretrained=... --output_path ...`` reads it."""

    def read(name: str) -> EvaluatorConfig:
        given = {"output_path": "out", "model_args": {"pretrained": str(checkpoint)}}
        return EvaluatorConfig(**{**EvaluatorConfig.load_yaml_config(RECIPES / f"{name}.yaml"), **given})._configure()

    return read


def manager(config: EvaluatorConfig, folder: Path) -> TaskManager:
    include = RECIPES / "tasks" if config.include_path else folder
    return TaskManager(include_path=str(include), include_defaults=False, metadata=config.metadata)


FOLDERS = {
    "aime": "aime",
    "babilong": "babilong",
    "gsm8k": "gsm8k",
    "infinitebench": "infinitebench",
    "longbench": "longbench",
    "longbench2": "longbench2",
    "math500": "minerva_math",
    "ruler": "ruler",
    "wikitext": "wikitext",
}


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_lm_evals_and_the_tasks_exist(name: str, recipe: Callable[[str], EvaluatorConfig]) -> None:
    config = recipe(name)
    assert config.model == "fasa_hf"
    assert config.log_samples
    assert config.include_path in (None, "evals/quality/recipes/tasks")
    known = manager(config, LM_EVAL_TASKS / FOLDERS[name])
    assert known.match_tasks(list(config.tasks)) == sorted(config.tasks)


@pytest.mark.parametrize("name", ["aime", "babilong", "gsm8k", "infinitebench", "longbench", "longbench2", "math500"])
def test_a_model_that_knows_scores_one(name: str, recipe: Callable[[str], EvaluatorConfig], stubs: None) -> None:
    if name == "longbench":
        for module in ("jieba", "fuzzywuzzy", "rouge"):
            pytest.importorskip(module, reason="LongBench's metrics need lm-eval[longbench]")
    config = recipe(name)
    loaded = manager(config, LM_EVAL_TASKS / FOLDERS[name]).load(list(config.tasks))
    results = evaluate(Knowing(), loaded, limit=2, bootstrap_iters=0)
    assert results is not None
    best = {
        task: max(float(score) for metric, score in scores.items() if "," in metric and "stderr" not in metric)
        for task, scores in results["results"].items()
        if task in results["n-samples"]
    }
    assert best
    wrong = {task: score for task, score in best.items() if score < 1 - 1e-6}  # ROUGE adds 1e-8 to what it divides by
    assert wrong == {}


def test_answers_outside_a_box_do_not_count(stubs: None, recipe: Callable[[str], EvaluatorConfig]) -> None:
    tasks = manager(recipe("math500"), RECIPES).load(["fasa_math500"])["tasks"]
    task = tasks["fasa_math500"]
    doc = ROWS["HuggingFaceH4/MATH-500"]
    assert task.process_results(doc, [r"thinking ... $\frac{1}{2}$"]) == {"exact_match": 0.0}
    assert task.process_results(doc, [r"\boxed{3}, no: \boxed{\frac12}"]) == {"exact_match": 1.0}
    assert task.process_results(doc, [r"\boxed{\frac{1}{3}}"]) == {"exact_match": 0.0}
    assert task.doc_to_text(doc).endswith(r"put your final answer within \boxed{}.")


def test_reasoning_recipes_have_the_papers_sampling(recipe: Callable[[str], EvaluatorConfig], stubs: None) -> None:
    for name, tokens in (("math500", 15360), ("aime", 31744)):
        config = recipe(name)
        for task in manager(config, RECIPES).load(list(config.tasks))["tasks"].values():
            settings = task.config.generation_kwargs
            assert (settings["do_sample"], settings["temperature"], settings["max_gen_toks"]) == (True, 0.6, tokens)


def test_wikitext_windows_do_not_overlap_and_score_the_last_tokens(
    recipe: Callable[[str], EvaluatorConfig], stubs: None, checkpoint: Path
) -> None:
    config = recipe("wikitext")
    assert {"prefill": 8000, "decode": 256}.items() <= config.metadata.items()
    config.metadata |= {"prefill": 300, "decode": 40}
    task = manager(config, RECIPES).load(list(config.tasks))["tasks"]["fasa_wikitext_windows"]
    docs = list(task.test_docs())
    assert len(docs) > 5
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "".join(doc["prompt"] + doc["target"] for doc in docs)
    assert text.count("= Title =") > 5
    for doc in docs:
        assert abs(len(tokenizer(doc["target"]).input_ids) - 40) <= 3
        assert abs(len(tokenizer(doc["prompt"]).input_ids) - 300) <= 3
    assert task.process_results(docs[0], [(-80.0, False)]) == {"token_perplexity": (-80.0, 40), "nll": 2.0}


def test_the_page_documents_every_recipe() -> None:
    page = (RECIPES / "README.md").read_text()
    assert [name for name in NAMES if f"{name}.yaml" not in page] == []
