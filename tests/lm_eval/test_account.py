"""Every task has an account of its own, and processes add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from fasa_flex.lm_eval.account import Account, Run
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.lm_eval.model import FasaHFLM

LAYERS, SPARSE_LAYERS = 3, 2
Load = Callable[..., FasaHFLM]


def asked(task: str, kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=(task, i, 1)) for i, args in enumerate(arguments)]


def test_tasks_of_one_kind_are_counted_apart(sparse: Load, caplog: pytest.LogCaptureFixture) -> None:
    text = heldout_text()
    letters = asked("letters", "loglikelihood", (text[:300], "("), (text[:300], ")"))
    answers = asked("answers", "loglikelihood", (text[:200], " return x"), (text[:300], "["))
    lm = sparse(batch_size=2)
    together = lm.loglikelihood([letters[0], answers[0], letters[1], answers[1]], disable_tqdm=True)
    warned = caplog.text
    alone = sparse()
    apart = [
        alone.loglikelihood([own], disable_tqdm=True)[0] for own in (letters[0], answers[0], letters[1], answers[1])
    ]
    assert [total for total, _ in together] == pytest.approx([total for total, _ in apart], abs=1e-4)
    account = lm.get_model_info()["fasa"]
    tasks = account["tasks"]
    assert set(tasks) == {"letters", "answers"}
    assert tasks["letters"]["sparse_queries"] == 0 < tasks["answers"]["sparse_queries"]
    assert tasks["letters"]["dense_answers"] == 2
    assert tasks["answers"]["dense_answers"] == 1
    assert account["requests"]["loglikelihood"]["requests"] == 4
    assert "NO SPARSE QUERY in loglikelihood requests of letters" in warned
    assert "NO SPARSE QUERY in loglikelihood requests of answers" not in warned
    assert "1 of 2 loglikelihood requests of answers were answered by dense queries alone" in warned
    assert [warning.split(":")[0][:15] for warning in account["warnings"]] == ["NO SPARSE QUERY", "1 of 2 loglikel"]
    json.dumps(account)


def test_answers_cut_at_their_maximum_are_counted(sparse: Load) -> None:
    text = heldout_text()
    lm = sparse()
    lm.generate_until(asked("cut", "generate_until", (text[:200], {"until": ["\0"], "max_gen_toks": 4})))
    lm.generate_until(asked("as long as asked", "generate_until", (text[:200], {"until": [], "max_gen_toks": 4})))
    tasks = lm.get_model_info()["fasa"]["tasks"]
    assert tasks["cut"]["unfinished"] == 1
    assert tasks["as long as asked"]["unfinished"] == 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_of_a_models_own_ends_ends_an_answer(
    sparse: Load, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3 has three and its tokenizer knows one: an answer that ends on another is finished, in every batch."""
    lm, text = sparse(batch_size=batch_size), heldout_text()
    until = {"until": ["\0"], "max_gen_toks": 6}
    requests = asked("t", "generate_until", *((text[at : at + 150], until) for at in (0, 700, 1900, 3100)))
    written: list[list[int]] = []
    generate = lm._model_generate

    def recording(context: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rows = generate(context, *arguments, **options)
        written.extend(rows[:, context.shape[1] :].tolist())
        return rows

    monkeypatch.setattr(lm, "_model_generate", recording)
    lm.generate_until(requests, disable_tqdm=True)
    assert lm.account.by("task")["t"].unfinished == 4
    end = written[1][2]
    lm.model.generation_config.eos_token_id = [1, end]
    lm.get_model_info()
    lm.generate_until(requests, disable_tqdm=True)
    ended = sum(end in answer for answer in written[:4])
    assert 0 < ended < 4
    assert lm.account.by("task")["t"].unfinished == 4 - ended


def test_runs_add_up_and_shares_are_weighted() -> None:
    one = Run("t", "k", 1, 0, 1, 0, {"sparse_queries": 10, "kv_share": 0.5, "note": "a"}, 5.0, 10.0, 6.0)
    other = Run("t", "k", 2, 1, 0, 3, {"sparse_queries": 30, "kv_share": 0.1, "new_bytes": 7}, 3.0, 30.0, 7.0)
    both = one + other
    assert (both.requests, both.dense_answers, both.truncated, both.unfinished) == (3, 1, 1, 3)
    assert both.stats["sparse_queries"] == 40
    assert both.stats["kv_share"] == pytest.approx(0.2)
    assert (both.stats["note"], both.stats["new_bytes"]) == ("a", 7)
    described = both.as_dict()
    assert described["kv_share"] == pytest.approx(8 / 40)  # of keys, not of queries
    assert described["kv_bytes_share"] == pytest.approx(13 / 40)
    unknown = Run("t", "k", valid=30.0, bytes_read=None)
    assert (one + unknown).as_dict()["kv_bytes_share"] is None


def test_gathering_twice_counts_once(sparse: Load) -> None:
    """lm-eval gathers samples and metrics, each with a call of its own."""
    lm = sparse()
    lm.loglikelihood(asked("t", "loglikelihood", (heldout_text()[:200], " return x")), disable_tqdm=True)
    counts = lm.account.export()
    other = Account(lm.fasa.stats)
    for _ in range(2):
        other.gathered([counts, counts])
    assert other.by("task")["t"].sparse_queries == 2 * lm.account.by("task")["t"].sparse_queries > 0
    assert lm.gather_object("samples") == ["samples"]
    assert lm.account.by("task")["t"].requests == 1


def test_copies_that_even_out_processes_do_not_run(sparse: Load) -> None:
    text = heldout_text()
    requests = asked("t", "loglikelihood", (text[:200], " return x"), (text[:300], " return y"))
    alone, one_of_two = sparse(), sparse()
    one_of_two._world_size = 2
    answers = one_of_two.loglikelihood([*requests, requests[1], requests[1]], disable_tqdm=True)
    assert answers[:2] == alone.loglikelihood(requests, disable_tqdm=True)
    assert answers[2:] == [answers[1]] * 2
    assert one_of_two.account.export() == alone.account.export()


@pytest.mark.parametrize(
    ("options", "ranking", "rows"),
    [
        ({"n_tip": 2}, 2 / 16, 1.0),
        ({"n_tip": 2, "per": "query_head"}, 4 / 16, 2.0),
        ({"n_tip": 2, "group_reduce": "none"}, 2 / 16, 2.0),
        ({"method": "random_chunks", "n_tip": 4}, 4 / 16, 1.0),
        ({"method": "streaming_llm"}, 0.0, 1.0),
        ({"method": "oracle"}, 0.5, 0.5),
        ({"method": "snapkv"}, 0.0, 1.5),
        ({"method": "h2o"}, 0.0, 1.0),
        ({"method": "rkv"}, 0.0, 1.5),
        ({"method": "quest"}, 1 / 16, 1.0),
        ({"method": "sparq", "n_tip": 4}, 4 / 16, 1.0),
        ({"method": "double_sparsity", "n_tip": 1}, 1 / 16, 1.0),
        ({"method": "adjacent_pairs", "n_tip": 4}, 4 / 16, 1.0),
    ],
)
def test_bytes_read_are_ranking_and_rows(
    sparse: Load, tmp_path: Path, options: dict[str, Any], ranking: float, rows: float
) -> None:
    lm = sparse(profile_cache=str(tmp_path), **options)
    lm.loglikelihood(asked("t", "loglikelihood", (heldout_text()[:400], " return x")), disable_tqdm=True)
    account = lm.get_model_info()["fasa"]["tasks"]["t"]
    assert 0 < account["kv_share"] < 0.5
    assert account["kv_bytes_share"] == pytest.approx(min(1.0, ranking + rows * account["kv_share"]))
