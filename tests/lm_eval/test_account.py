"""Every task has an account of its own, and processes add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

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
    settings = {"criterion": None, "packed_dtype": "int4", "completion": "mean"}
    one = Run("t", "k", 1, 0, 1, 0, 4, 10, settings, 5.0, 10.0, 6.0)
    other = Run("t", "k", 2, 1, 0, 3, 5, 30, {**settings, "criterion": "variance"}, 3.0, 30.0, 7.0)
    described = (one + other).as_dict()
    assert described.pop("kv_share") == pytest.approx(8 / 40)  # of keys, not of queries
    assert described.pop("kv_bytes_share") == pytest.approx(13 / 40)
    assert described == {
        "kind": "k",
        "requests": 3,
        "dense_answers": 1,
        "truncated": 1,
        "unfinished": 3,
        "dense_queries": 9,
        "sparse_queries": 40,
        "criterion": "variance",  # not known before the first prompt has calibrated
        "packed_dtype": "int4",
        "completion": "mean",
    }
    unknown = Run("t", "k", valid=30.0, bytes_read=None)
    for both in (one + unknown, unknown + one):
        assert both.as_dict()["kv_bytes_share"] is None
        assert both.settings == settings


def test_a_sum_names_every_setting_that_ran() -> None:
    runs = [Run("t", "k", settings={"packed_dtype": each, "criterion": None}) for each in ("int4", "float32", "int4")]
    assert (runs[0] + runs[1] + runs[2]).settings == {"packed_dtype": "int4, float32", "criterion": None}


def test_a_task_says_what_ran(sparse: Load) -> None:
    lm = sparse()
    lm.loglikelihood(asked("t", "loglikelihood", (heldout_text()[:200], " return x")), disable_tqdm=True)
    counted, account = lm.fasa.stats.as_dict(), lm.get_model_info()["fasa"]["tasks"]["t"]
    assert counted["sparse_queries"] > 0
    assert {name: account[name] for name in counted} == pytest.approx(counted)
    assert (account["packed_dtype"], account["completion"]) == ("int4", "first_order")


@pytest.mark.skipif(
    not hasattr(HFLM, "gather_object"), reason="lm-eval before 0.4.12 asks no model to gather: one process only"
)
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


def packed(n_bytes: float) -> float:
    """In units of a token's key and value in one head: 2 x 16 numbers of float32."""
    return n_bytes / (2 * 16 * 4)


INT4 = packed(4 * 4 / 8 + 2)  # 4 dimensions of 4 bits and a float16 scale, which are 2 chunks
STATE = (1 + 16) / 2  # a mean value and a covariance of 16 x 16, halves of a key and value of 16
PLAIN = {"packed_dtype": None, "completion": "none"}


@pytest.mark.parametrize(
    ("options", "ranking", "rows", "state"),
    [
        ({"n_tip": 2}, INT4, 1.0, STATE),
        ({"n_tip": 2, "completion": "mean"}, INT4, 1.0, 0.5),
        ({"n_tip": 2, "completion": "none"}, INT4, 1.0, 0.0),
        ({"n_tip": 2, "packed_dtype": "int8"}, packed(4 + 2), 1.0, STATE),
        ({"n_tip": 2, **PLAIN}, 2 / 16, 1.0, 0.0),
        ({"n_tip": 2, "per": "query_head"}, 4 / 16, 2.0, 0.0),
        ({"n_tip": 2, "group_reduce": "none"}, INT4, 2.0, STATE),
        ({"method": "random_chunks", "n_tip": 4}, 4 / 16, 1.0, 0.0),
        (
            {"method": "random_chunks", "n_tip": 4, "packed_dtype": "int4", "completion": "first_order"},
            packed(8 * 4 / 8 + 2),
            1.0,
            STATE,
        ),
        ({"method": "streaming_llm"}, 0.0, 1.0, 0.0),
        ({"method": "oracle"}, 0.5, 0.5, 0.0),
        ({"method": "snapkv"}, 0.0, 1.5, 0.0),
        ({"method": "h2o"}, 0.0, 1.0, 0.0),
        ({"method": "rkv"}, 0.0, 1.5, 0.0),
        ({"method": "quest"}, 1 / 16, 1.0, 0.0),
        ({"method": "sparq", "n_tip": 4}, 4 / 16, 1.0, 0.5),
        ({"method": "sparq", "n_tip": 4, "completion": "none"}, 4 / 16, 1.0, 0.0),
        ({"method": "vattention", "n_tip": 2}, 2 / 16, 1.0, 0.0),
        ({"method": "vattention", "n_tip": 2, "packed_dtype": "int4"}, INT4, 1.0, 0.0),
        ({"method": "double_sparsity", "n_tip": 1}, 1 / 16, 1.0, 0.0),
        ({"method": "adjacent_pairs", "n_tip": 4}, 4 / 16, 1.0, 0.0),
    ],
)
def test_bytes_read_are_ranking_rows_and_state(
    sparse: Load, tmp_path: Path, options: dict[str, Any], ranking: float, rows: float, state: float
) -> None:
    """One answer: the query of its i-th token chooses from the context and i keys more; the first token's is dense."""
    lm, context, answer = sparse(profile_cache=str(tmp_path), **options), heldout_text()[:400], " return x"
    lm.loglikelihood(asked("t", "loglikelihood", (context, answer)), disable_tqdm=True)
    account = lm.get_model_info()["fasa"]["tasks"]["t"]
    given, answered = map(len, lm._encode_pair(context, answer))
    n_valid = given + answered / 2  # the mean of given + 1 .. given + answered - 1
    assert account["sparse_queries"] == SPARSE_LAYERS * (answered - 1) > 0
    assert account["kv_share"] == pytest.approx(16 / n_valid)
    assert account["kv_bytes_share"] == pytest.approx(min(1.0, ranking + (rows * 16 + state) / n_valid))
