"""The documented commands, typed as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points, files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fasa_flex import calibrate
from fasa_flex.lm_eval import TASKS_PATH

LM_EVAL = str(Path(sys.executable).with_name("lm_eval"))
METADATA = '{"max_seq_lengths": [192], "num_docs": 4, "n_facts": 2}'


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # never from the checkout's root, where `import fasa_flex` would find the sources instead of the installation
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, cwd=Path.home(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def python(code: str, **environment: str) -> str:
    return command(sys.executable, "-c", code, **environment).stdout.strip()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model and its profile on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder, profile = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("profile")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    llama = LlamaForCausalLM(config)
    llama.save_pretrained(folder)
    sample = torch.randint(2, 258, (100,), generator=torch.Generator().manual_seed(0))
    calibrate(llama, [sample], top_k=16, max_new_tokens=4, progress=False).save_pretrained(profile)
    return {"model": folder, "profile": profile}


@pytest.mark.slow
def test_the_literal_command(model: dict[str, Path], tmp_path: Path) -> None:
    arms = {
        "fasa_hf": (f"pretrained={model['model']},profile={model['profile']},n_fac=24,n_tip=2", [LM_EVAL]),
        "hf": (f"pretrained={model['model']}", [sys.executable, "-m", "fasa_flex.lm_eval"]),
    }
    hashes = {}
    for name, (arguments, launcher) in arms.items():
        include = ["--include_path", str(TASKS_PATH)] if launcher == [LM_EVAL] else []
        command(
            *launcher, "--model", name, "--model_args", arguments, *include,
            "--tasks", "fasa_needle,fasa_recall,fasa_ppl", "--metadata", METADATA, "--limit", "3",
            "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / name), "--log_samples",
        )  # fmt: skip
        (results,) = (json.loads(path.read_text()) for path in (tmp_path / name).rglob("results_*.json"))
        assert set(results["results"]) == {"fasa_needle", "fasa_recall", "fasa_ppl"}
        lines = [
            json.loads(line)
            for path in (tmp_path / name).rglob("samples_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        hashes[name] = sorted(line["prompt_hash"] for line in lines)
        if name == "fasa_hf":
            account = results["config"]["fasa"]
            assert account["n_fac"] == 24
            assert all(kind["sparse_queries"] > 0 for kind in account["requests"].values())
            assert set(account["requests"]) == {"generate_until", "loglikelihood", "loglikelihood_rolling"}
    assert len(hashes["hf"]) == 9
    assert hashes["hf"] == hashes["fasa_hf"]
    script = str(Path(sys.executable).with_name("fasa-flex"))
    printed = command(script, "compare", str(tmp_path / "hf"), str(tmp_path / "fasa_hf")).stdout
    assert "| fasa_needle | exact_match | dense | - |" in printed
    assert "| fasa_recall | nll | fasa | 24 |" in printed
    assert "| fasa_ppl | bits_per_byte [nats per unit] | fasa | 24 |" in printed


def run_of(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, Any]]]:
    """Results, and every document's sample."""
    (results,) = (json.loads(path.read_text()) for path in folder.rglob("results_*.json"))
    samples = {}
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.split("_2")[0]
        samples |= {(task, doc["doc_id"]): doc for doc in map(json.loads, path.read_text().splitlines())}
    return results, samples


@pytest.mark.slow
def test_two_processes_answer_and_count_as_one(model: dict[str, Path], tmp_path: Path) -> None:
    """Five documents for two processes: lm-eval gives the second a copy to answer, which must not count."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, words in (("one", [sys.executable]), ("two", launch)):
        command(
            *words, "-m", "fasa_flex.lm_eval", "--model", "fasa_hf",
            "--model_args", f"pretrained={model['model']},profile={model['profile']},n_fac=24,n_tip=2",
            "--tasks", "fasa_needle,fasa_recall,fasa_ppl",
            "--metadata", '{"max_seq_lengths": [192], "num_docs": 5, "n_facts": 2}',
            "--output_path", str(tmp_path / name), "--log_samples",
            ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
        )  # fmt: skip
    (one, alone), (two, together) = run_of(tmp_path / "one"), run_of(tmp_path / "two")
    assert (one["config"]["fasa"]["processes"], two["config"]["fasa"]["processes"]) == (1, 2)
    assert len(alone) == 15
    assert set(alone) == set(together)
    for key, doc in alone.items():
        assert together[key]["prompt_hash"] == doc["prompt_hash"]
        assert str(together[key]["filtered_resps"])[:12] == str(doc["filtered_resps"])[:12]
    for task, run in one["config"]["fasa"]["tasks"].items():
        other = two["config"]["fasa"]["tasks"][task]
        assert set(other) == set(run)
        for name, value in run.items():
            assert other[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (task, name)
    for task, scores in one["results"].items():
        for metric, score in scores.items():
            if isinstance(score, float) and "stderr" not in metric:
                assert two["results"][task][metric] == pytest.approx(score, rel=1e-5)


def test_starting_python_imports_nothing_heavy() -> None:
    loaded = python("import sys; print(*{'torch', 'transformers', 'lm_eval', 'fasa_flex'} & set(sys.modules))")
    assert loaded == ""


def test_the_name_is_registered_beside_lm_evals_own_and_can_be_switched_off() -> None:
    code = (
        "import lm_eval.models; from lm_eval.api.registry import model_registry as r; print('fasa_hf' in r, 'hf' in r)"
    )
    assert python(code) == "True True"
    assert python(code, FASA_FLEX_NO_STARTUP="1") == "False True"


def test_the_hook_is_gone_once_it_has_worked() -> None:
    code = "import sys; before = len(sys.meta_path); import lm_eval.models; print(before - len(sys.meta_path))"
    assert python(code) == "1"


def test_the_hook_stands_aside_where_lm_eval_loads_plugins() -> None:
    code = (
        "from lm_eval.api import registry; registry.load_plugins = lambda: None; import lm_eval.models; "
        "print('fasa_hf' in registry.model_registry)"
    )
    assert python(code) == "False"


def test_importing_the_class_first_registers_it_once() -> None:
    code = (
        "from fasa_flex.lm_eval.model import FasaHFLM; import lm_eval.models; "
        "from lm_eval.api.registry import get_model; print(get_model('fasa_hf') is FasaHFLM)"
    )
    assert python(code) == "True"


def test_the_entry_point_names_the_module_that_defines_the_class() -> None:
    (found,) = entry_points(group="lm_eval.models", name="fasa_hf")
    loaded = found.load()
    assert f"{loaded.__module__}:{loaded.__name__}" == found.value


@pytest.mark.parametrize("first", ["hook", "lm-eval"])
def test_the_next_lm_eval_and_the_hook_do_not_meet(first: str) -> None:
    """It registers entry points by their value, once and lazily, and leaves names that are taken alone."""
    code = (
        "from importlib.metadata import entry_points; from lm_eval.api import registry; import lm_eval.models\n"
        "(found,) = entry_points(group='lm_eval.models', name='fasa_hf')\n"
        "names = registry.model_registry\n"
        "if 'fasa_hf' not in names: names.register(found.name, target=found.value)\n"
        "cls = registry.get_model('fasa_hf')\n"
        "print(cls is found.load(), cls.__name__, list(names.keys()).count('fasa_hf'))"
    )
    environment = {"FASA_FLEX_NO_STARTUP": "1"} if first == "lm-eval" else {}
    assert python(code, **environment) == "True FasaHFLM 1"


def test_uninstalling_removes_everything_that_was_installed() -> None:
    """pip removes what the record lists; beside the package these are the hook, its line, and the command."""
    recorded = {Path(str(path)).name for path in files("fasa-flex") or ()}
    assert {"_fasa_flex_startup.py", "fasa_flex_startup.pth", "fasa-flex"} <= recorded
    site = Path(sysconfig.get_path("purelib"))
    ours = {path.name for path in site.iterdir() if path.suffix in (".pth", ".py") and "fasa" in path.name}
    assert ours <= recorded


def test_the_tasks_path_is_printed() -> None:
    assert command(sys.executable, "-m", "fasa_flex.lm_eval", "--tasks-path").stdout.strip() == str(TASKS_PATH)
