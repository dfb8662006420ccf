"""The script that asks RULER's tasks of several arms: its commands, what it keeps of a run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.utils import simple_parse_args_string

from evals.quality import generation_tables, ruler
from evals.quality.arms import PartLedger
from evals.quality.ruler_arms import ARMS, Model, Questions, command, paper, word
from fasa_flex import FasaConfig
from fasa_flex.lm_eval.arguments import config_of
from fasa_flex.report.compare import Run

ASKED = Questions(lengths=(1024, 2048), documents=2, batch=2, chat=True)
MODEL = Model("folder", "model.gguf", "profile")


def said(arm: str) -> list[str]:
    return command(MODEL, ASKED, arm, "ruler_vt", json.dumps(ASKED.samples("ruler_vt")), "tokens", "out", "cpu")


def test_the_papers_fields_say_what_the_papers_settings_are() -> None:
    """Read as lm-eval's command line reads them, and as `simple_evaluate` does."""
    words = ",".join(f"{name}={word(value)}" for name, value in paper(256).items())
    for read in (key_val_to_dict, simple_parse_args_string):
        assert config_of("fasa", **read(words)) == FasaConfig.paper(n_fac=256)


def test_arms_differ_in_the_model_alone() -> None:
    dense, default = said("dense"), said("fasa 256")
    at = dense.index("--model_args")
    assert dense[at + 2 :] == default[at + 2 :]
    assert dense[:2] == ["--model", "hf"]
    assert dense[at + 1] == "pretrained=folder,dtype=bfloat16,gguf_file=model.gguf"
    assert default[at + 1] == f"{dense[at + 1]},profile=profile,on_truncation=error,n_fac=256"
    samples = json.loads(default[default.index("--samples") + 1])
    assert samples == {"ruler_vt": [0, 1, 500, 501]}


def run_of(scores: dict[str, dict[str, float]], sparse: int = 7) -> Run:
    account = {"tasks": {"ruler_vt": {"sparse_queries": sparse, "kv_share": 0.1, "kv_bytes_share": 0.2}}}
    prompts = {document: f"prompt {document}" for length in scores.values() for document in length}
    found = {("ruler_vt", length): own for length, own in scores.items()}
    return Run(Path("run"), "fasa_hf", account, {"ruler_vt": prompts}, found)


SCORES = {"1024": {"0": 1.0, "1": 0.2}, "2048": {"500": 0.0, "501": 0.4}}


def test_rows_keep_every_document() -> None:
    short, long = ruler.rows_of(run_of(SCORES), "ruler_vt", "fasa 256", ASKED)
    assert (short["length"], short["scores"]) == (1024, [1.0, 0.2])
    assert (long["length"], long["scores"]) == (2048, [0.0, 0.4])
    assert short["prompts"] != long["prompts"]
    assert long["kv_bytes_share"] == 0.2


def test_rows_are_refused_where_they_would_mislead() -> None:
    with pytest.raises(ValueError, match="no sparse query in ruler_vt"):
        ruler.rows_of(run_of(SCORES, sparse=0), "ruler_vt", "fasa 256", ASKED)
    moved = {"1024": SCORES["1024"], "2048": {"499": 0.0, "500": 0.4}}
    with pytest.raises(ValueError, match="at 2048 tokens, but 2 were requested"):
        ruler.rows_of(run_of(moved), "ruler_vt", "fasa 256", ASKED)
    with pytest.raises(ValueError, match="1 scores at 2048"):
        ruler.rows_of(run_of({**SCORES, "2048": {"500": 0.0}}), "ruler_vt", "fasa 256", ASKED)


def test_arms_that_were_asked_other_questions_are_refused() -> None:
    row = {"length": 1024, "prompts": "a"}
    ruler.check_prompts({"dense/ruler_vt": {"rows": [row]}, "fasa 256/ruler_vt": {"rows": [row]}})
    other = {"dense/ruler_vt": {"rows": [row]}, "fasa 256/ruler_vt": {"rows": [{**row, "prompts": "b"}]}}
    with pytest.raises(ValueError, match="fasa 256 and dense had different prompts of ruler_vt at 1024"):
        ruler.check_prompts(other)


def test_files_are_joined(tmp_path: Path) -> None:
    first, other = PartLedger(tmp_path / "a.json", {}), PartLedger(tmp_path / "b.json", {})
    first.keep("dense/ruler_vt", {"n": 1}, 3, [{"length": 1}])
    other.keep("fasa 256/ruler_vt", {"n": 2}, 4, [{"length": 2}])
    ruler.take_over(first, [tmp_path / "b.json"])
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["parts"].keys() == {"dense/ruler_vt", "fasa 256/ruler_vt"}
    assert kept["seconds"] == 7


def test_tables_pair_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_tables, "RESULTS", tmp_path)
    ledger = PartLedger(tmp_path / "ruler_smollm2.json", {})
    for arm in ARMS:
        lost = 0.0 if arm == "dense" else 0.5
        rows = [{"length": length, "scores": [1 - lost, 0.5 - lost]} for length in (1024, 2048)]
        ledger.keep(f"{arm}/ruler_vt", {}, 1, rows)
    head, _, first, *_, last = generation_tables.ruler().splitlines()
    assert head.startswith("| task | tokens | dense | default, 256 tokens |")
    assert first == "| `ruler_vt` | 1024 | 0.75 |" + " -0.50 [-0.50, -0.50] |" * 3
    assert last.startswith("| all | 2048 | 0.75 |")
