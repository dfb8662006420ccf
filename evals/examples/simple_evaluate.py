"""fasa_hf from Python: dense attention and FASA on the same documents, and the bytes that sparse queries read."""

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from fasa_flex.lm_eval import TASKS_PATH

MODEL = "evals/reference_model"  # or another folder, or a name on the Hub
TASKS = ["fasa_needle", "fasa_ppl_position"]  # or any task of lm-eval; then leave out include_path and metadata

device = "cuda" if torch.cuda.is_available() else "cpu"  # hf's own default is cuda, also where there is none
documents = {"tokenizer": MODEL, "max_seq_lengths": [1024], "num_docs": 8}
manager = TaskManager(include_path=str(TASKS_PATH), metadata=documents)

for model, options in {"hf": {}, "fasa_hf": {"n_fac": 64}}.items():
    arguments = {"pretrained": MODEL, **options}
    results = simple_evaluate(model, arguments, tasks=TASKS, limit=8, device=device, task_manager=manager)
    print(model, {task: results["results"][task] for task in TASKS})

for task, account in results["config"]["fasa"]["tasks"].items():
    print(f"{task}: {account['sparse_queries']} sparse queries read {account['kv_bytes_share']:.1%} of the bytes")
