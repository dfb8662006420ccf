"""`fasa_hf` against real token-by-token decoding, against `hf`, and against its own account."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from generation import log_likelihood
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sentences import raises_sentence
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from fasa_flex.baselines import Method
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.lm_eval.model import FasaHFLM

pytestmark = pytest.mark.filterwarnings("error:.past_key_values.*is deprecated:FutureWarning")

LAYERS, SPARSE_LAYERS, POSITIONS = 3, 2, 768
METHODS = ("fasa", *get_args(Method))
Load = Callable[..., FasaHFLM]
Requests = Callable[..., list[Instance]]


def pairs(count: int = 6) -> list[tuple[list[int], list[int]]]:
    """Contexts of 20 to 200 tokens with continuations of 1 to 12."""
    rng = random.Random(3)
    return [
        ([rng.randrange(2, 400) for _ in range(rng.randrange(20, 200))], [rng.randrange(2, 400) for _ in range(length)])
        for length in [1, 12, *(rng.randrange(2, 12) for _ in range(count - 2))]
    ]


def decode(lm: HFLM, context: list[int], continuation: list[int], prompt: int) -> float:
    return log_likelihood(lm.model, context, continuation, prompt)


@pytest.fixture
def loaded(sparse: Load) -> Iterator[FasaHFLM]:
    lm = sparse()
    yield lm
    lm.fasa.disable()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_one_pass_equals_token_by_token_decode(
    sparse: Load, dense: Callable[..., HFLM], tmp_path: Path, method: str, batch_size: int
) -> None:
    lm = sparse(method=method, batch_size=batch_size, profile_cache=str(tmp_path))
    scored = lm._loglikelihood_tokens([(("", str(i)), *pair) for i, pair in enumerate(pairs())], disable_tqdm=True)
    stepped = [decode(lm, context, continuation, prompt=len(context)) for context, continuation in pairs()]
    assert [total for total, _ in scored] == pytest.approx(stepped, abs=1e-4)
    reference = [decode(dense(), context, continuation, prompt=len(context)) for context, continuation in pairs()]
    differs = [abs(a - b) > 1e-3 for a, b in zip(stepped, reference, strict=True)]
    assert differs == [len(continuation) > 1 for _, continuation in pairs()]  # one token alone is always dense


def test_sparse_tail_equals_decoding_the_end_of_the_prompt(sparse: Load) -> None:
    lm = sparse(sparse_tail=5)
    scored = lm._loglikelihood_tokens([(("", str(i)), *pair) for i, pair in enumerate(pairs())], disable_tqdm=True)
    stepped = [decode(lm, context, continuation, prompt=len(context) - 5) for context, continuation in pairs()]
    assert [total for total, _ in scored] == pytest.approx(stepped, abs=1e-4)


@pytest.mark.parametrize("dense_prefix", [0, 40])
def test_rolling_equals_decoding_behind_the_prefix(sparse: Load, requests: Requests, dense_prefix: int) -> None:
    lm = sparse(dense_prefix=dense_prefix)
    text = heldout_text()[500:900]  # the first 400 hold a tie within rounding, which the two ways break differently
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    context, tokens = [lm.prefix_token_id], lm.tok_encode(text)
    expected = decode(lm, context, tokens, prompt=1)
    if dense_prefix:
        lm.fasa.disable()
        densely = decode(lm, context, tokens, prompt=1)
        assert abs(total - expected) > 1e-3  # the prefix matters
        assert total != pytest.approx(densely, abs=1e-3)  # and so does what follows it
    else:
        assert total == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("method", "batch_size"), [("fasa", 1), *((method, 4) for method in METHODS)])
def test_a_budget_beyond_the_context_equals_hf(
    sparse: Load, dense: Callable[..., HFLM], requests: Requests, tmp_path: Path, method: str, batch_size: int
) -> None:
    text = heldout_text()
    scored = requests("loglikelihood", *((text[i * 300 : i * 300 + 200 + 90 * i], " return x") for i in range(6)))
    rolled = requests("loglikelihood_rolling", *((text[i * 500 : i * 500 + 300 + 20 * i],) for i in range(3)))
    written = requests(
        "generate_until",
        *((text[i * 300 : i * 300 + 150 + 60 * i], {"until": ["\n\n"], "max_gen_toks": 12}) for i in range(6)),
    )
    ours = sparse(method=method, n_fac=POSITIONS, batch_size=batch_size, profile_cache=str(tmp_path))
    theirs = dense(batch_size=batch_size)
    for a, b in zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(theirs.loglikelihood_rolling(rolled), abs=1e-3)
    assert ours.generate_until(written) == theirs.generate_until(written)


def test_the_account_is_exact(loaded: FasaHFLM, requests: Requests, caplog: pytest.LogCaptureFixture) -> None:
    context, continuation = heldout_text()[:300], heldout_text()[300:330]
    head, tail = loaded._encode_pair(context, continuation)
    length, scored = len(head) + len(tail) - 1, len(tail)
    loaded.loglikelihood(requests("loglikelihood", (context, continuation)), disable_tqdm=True)
    counts = loaded.get_model_info()["fasa"]["requests"]["loglikelihood"]
    assert counts["sparse_queries"] == SPARSE_LAYERS * (scored - 1)
    assert counts["dense_queries"] == LAYERS * length - SPARSE_LAYERS * (scored - 1)
    valid = sum(range(length - scored + 2, length + 1))
    assert counts["kv_share"] == pytest.approx(16 * (scored - 1) / valid)
    assert "NO SPARSE QUERY" not in caplog.text


def test_padding_is_not_counted(sparse: Load, requests: Requests) -> None:
    asked = [(heldout_text()[i : i + 100 + 70 * i], " return x") for i in range(4)]
    totals = []
    for batch_size in (1, 4):
        lm = sparse(batch_size=batch_size)
        lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
        totals.append(lm.get_model_info()["fasa"]["requests"])
    assert totals[0] == totals[1]


@pytest.mark.parametrize("method", METHODS)
def test_generation_decodes_sparsely(sparse: Load, requests: Requests, tmp_path: Path, method: str) -> None:
    lm, prompt = sparse(method=method, profile_cache=str(tmp_path)), heldout_text()[:300]
    lm.generate_until(requests("generate_until", (prompt, {"until": [], "max_gen_toks": 8})), disable_tqdm=True)
    counts = lm.get_model_info()["fasa"]["requests"]["generate_until"]
    assert counts["sparse_queries"] == SPARSE_LAYERS * 7  # the first of 8 tokens comes from the dense prefill


def test_sparse_tail_reaches_generation(sparse: Load, requests: Requests) -> None:
    prompts = [heldout_text()[:300], heldout_text()[:400]]
    lm = sparse(sparse_tail=3, batch_size=2)
    lm.generate_until(requests("generate_until", *((p, {"until": [], "max_gen_toks": 4}) for p in prompts)))
    assert lm.get_model_info()["fasa"]["requests"]["generate_until"]["sparse_queries"] == SPARSE_LAYERS * 2 * (3 + 3)


def test_a_dense_result_says_so(
    loaded: FasaHFLM, sparse: Load, requests: Requests, caplog: pytest.LogCaptureFixture
) -> None:
    one_token = requests("loglikelihood", (heldout_text()[:300], "("))
    loaded.loglikelihood(one_token, disable_tqdm=True)
    assert "NO SPARSE QUERY in loglikelihood requests of unnamed, this result is dense attention" in caplog.text
    caplog.clear()
    sparse(sparse_tail=1).loglikelihood(one_token, disable_tqdm=True)
    assert "NO SPARSE QUERY" not in caplog.text


def test_lost_tokens_are_counted_or_refused(sparse: Load, requests: Requests) -> None:
    text = heldout_text()[:4000]
    asked = requests("loglikelihood", (text, " x = 1")), requests("generate_until", (text, {"max_gen_toks": 4}))
    lm = sparse()
    lm.loglikelihood(asked[0], disable_tqdm=True)
    lm.generate_until(asked[1], disable_tqdm=True)
    account = lm.get_model_info()["fasa"]
    assert account["truncated_inputs"] == 2
    assert account["requests"]["generate_until"]["truncated"] == 1
    assert "2 inputs of unnamed were too long and lost tokens on the left" in account["warnings"]
    strict = sparse(on_truncation="error")
    for run, batch in zip((strict.loglikelihood, strict.generate_until), asked, strict=True):
        with pytest.raises(ValueError, match=r"exceeds the model's maximum of 768 tokens"):
            run(batch, disable_tqdm=True)


def test_a_second_evaluation_is_accounted_for_alone(sparse: Load, requests: Requests) -> None:
    lm, asked = sparse(), requests("loglikelihood", (heldout_text()[:900], " return x"))
    reports = []
    for _ in range(2):
        lm.loglikelihood(asked, disable_tqdm=True)
        reports.append(lm.get_model_info()["fasa"])
    assert reports[0]["requests"]["loglikelihood"]["requests"] == 1
    assert reports[0]["requests"] == reports[1]["requests"]


def test_everything_that_decides_a_score_is_recorded(sparse: Load) -> None:
    lm = sparse(n_fac=0.25, n_sink=1, n_recent=2, dense_layers="0+2", dense_prefix=7)
    recorded = lm.get_model_info()["fasa"]
    assert recorded["profile"] == lm.profile.fingerprint
    expected = {"method": "fasa", "n_tip": 2, "n_fac": 0.25, "n_sink": 1, "n_recent": 2, "dense_layers": [0, 2]}
    assert expected.items() <= recorded.items()
    assert recorded["dense_prefix"] == 7
    assert recorded["stays_dense"] == dict.fromkeys(("0", "2"), "asked for by dense_layers")
    assert set(recorded["versions"]) == {"fasa-flex", "lm-eval", "torch", "transformers"}


def test_a_checkout_that_is_not_installed_reports(sparse: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == "fasa-flex":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    lm = sparse()
    monkeypatch.setattr(metadata, "distribution", distribution)
    assert lm.get_model_info()["fasa"]["versions"]["fasa-flex"] == "not installed"


def test_loading_leaves_the_global_generators_alone(sparse: Load) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    sparse(method="random_chunks")
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_an_answer_file_belongs_to_one_budget(sparse: Load, requests: Requests, tmp_path: Path) -> None:
    path, asked = str(tmp_path / "answers.db"), requests("loglikelihood", (heldout_text()[:300], " return x"))
    first = CachingLM(sparse(), path).loglikelihood(asked)
    lm = sparse()
    assert CachingLM(lm, path).loglikelihood(asked) == first
    assert lm.get_model_info()["fasa"]["warnings"][0].startswith("every answer came from --use_cache")
    with pytest.raises(ValueError, match="give --use_cache a path of its own"):
        CachingLM(sparse(n_fac=17), path)
    for other in ({"max_length": 128}, {"dtype": "bfloat16"}, {"softmax_dtype": "float64"}):
        with pytest.raises(ValueError, match="give --use_cache a path of its own"):
            CachingLM(sparse(**other), path)


def test_hf_never_reads_sparse_answers_nor_the_other_way_round(
    sparse: Load, dense: Callable[..., HFLM], requests: Requests, tmp_path: Path
) -> None:
    path, asked = str(tmp_path / "answers.db"), requests("loglikelihood", (heldout_text()[:300], " return x"))
    ours = CachingLM(sparse(), path).loglikelihood(asked)
    theirs = CachingLM(dense(), path).loglikelihood(asked)
    assert theirs == dense().loglikelihood(asked) != ours
    with pytest.raises(ValueError, match="give --use_cache a path of its own"):
        CachingLM(sparse(), path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": "auto"}, "batch_size=auto probes memory with dense attention only"),
        ({"nfac": 16}, "knows no argument 'nfac'; did you mean 'n_fac'"),
        ({"budget": 16}, "knows no argument 'budget'; did you mean 'n_fac'"),
        ({"packed_dtype": "int3"}, "packed_dtype must be one of 'bfloat16'"),
        ({"profile": 1.5}, "profile=1.5 is no profile"),
        ({"calibration_source": "/nope"}, "calibration_source=/nope has no effect where nothing is calibrated"),
        ({"method": "random_chunks", "n_tip": 64}, r"n_tip must lie in 1\.\.8, the chunks of a head, got 64"),
        ({"method": "pyramidkv"}, "method='pyramidkv' is not known; write one of fasa, streaming_llm"),
        ({"on_truncation": "ignore"}, "on_truncation='ignore' is not an option"),
        ({"n_fac": 0}, "n_fac must be an integer of at least 1, got 0"),
        ({"n_fac": 1.5}, "n_fac as a share must lie in"),
        ({"dense_layers": "0-2"}, "dense_layers='0-2' is not a set of layers"),
        ({"dense_layers": 9}, "dense_layers names layer 9, the model has 3"),
        ({"sparse_tail": -1}, "sparse_tail must be a whole number of tokens, got -1"),
    ],
)
def test_bad_arguments_are_one_sentence(sparse: Load, arguments: dict[str, object], sentence: str) -> None:
    with raises_sentence(ValueError, match=sentence):
        sparse(**arguments)


def test_a_profile_is_found_by_a_path_and_by_a_number(
    sparse: Load, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(profile, tmp_path / "12")
    monkeypatch.chdir(tmp_path)
    expected = sparse().profile.fingerprint
    assert sparse(profile=tmp_path / "12").profile.fingerprint == expected
    assert sparse(profile=12).profile.fingerprint == expected


def test_a_model_that_was_passed_is_dense_again_once_the_evaluation_is_over(checkpoint: Path, profile: Path) -> None:
    """Nobody holds a handle: the LM is dropped with the evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.randint(2, 400, (1, 60), generator=torch.Generator().manual_seed(0))
    small = {"max_seq_lengths": [192], "num_docs": 1, "tokenizer": str(checkpoint)}

    def decoded() -> torch.Tensor:
        with torch.no_grad():
            state = cache_argument(model, DynamicCache(config=model.config))
            model(ids, **state)
            return model(ids[:, :1], **state).logits

    before = decoded()
    simple_evaluate(
        model="fasa_hf",
        model_args={"pretrained": model, "tokenizer": tokenizer, "profile": profile, "n_fac": 8},
        tasks=["fasa_recall"],
        task_manager=TaskManager(include_path=str(TASKS_PATH), include_defaults=False, metadata=small),
        bootstrap_iters=0,
    )
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(decoded(), before)
    kept = FasaHFLM(model, tokenizer=tokenizer, profile=profile, n_fac=8)
    assert not torch.equal(decoded(), before)
    del kept
    assert torch.equal(decoded(), before)


def test_packed_keys_rank_in_one_pass_as_they_do_token_by_token(sparse: Load) -> None:
    asked = [(("", str(number)), *pair) for number, pair in enumerate(pairs())]
    totals = {}
    for dtype in (None, "int8"):
        lm = sparse(packed_dtype=dtype)
        totals[dtype] = [total for total, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]
        stepped = [decode(lm, context, continuation, prompt=len(context)) for context, continuation in pairs()]
        assert totals[dtype] == pytest.approx(stepped, abs=1e-4)
    assert totals["int8"] != pytest.approx(totals[None], abs=1e-4)


def test_a_sparse_prefill_is_sparse_in_log_likelihoods_too(sparse: Load) -> None:
    lm = sparse(prefill="sparse")
    scored = lm._loglikelihood_tokens([(("", str(i)), *pair) for i, pair in enumerate(pairs())], disable_tqdm=True)
    stepped = [decode(lm, context, continuation, prompt=1) for context, continuation in pairs()]
    assert [total for total, _ in scored] == pytest.approx(stepped, abs=1e-3)
    assert lm.get_model_info()["fasa"]["prefill"] == "sparse"
    lm.fasa.stats.reset()
    written = lm._model_generate(torch.tensor([pairs()[1][0]]), 250, [""])
    queries = written.shape[1] - 1  # of the prompt and of all new tokens but the last
    assert lm.fasa.stats.sparse_queries == SPARSE_LAYERS * (queries - 16)  # the first 16 attend to all their keys


def test_an_adapter_of_peft_is_evaluated_and_sparse(sparse: Load, checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(checkpoint),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    asked = [(("", str(number)), *pair) for number, pair in enumerate(pairs())]
    plain, lora = sparse(), sparse(peft=str(tmp_path))
    totals = [total for total, _ in lora._loglikelihood_tokens(asked, disable_tqdm=True)]
    assert lora.fasa.stats.sparse_queries > 0
    stepped = [decode(lora, context, continuation, prompt=len(context)) for context, continuation in pairs()]
    assert totals == pytest.approx(stepped, abs=1e-4)
    assert totals != pytest.approx([total for total, _ in plain._loglikelihood_tokens(asked, disable_tqdm=True)])


def test_a_prefill_by_blocks_is_counted(sparse: Load) -> None:
    """The words of the command line arrive, and the account has the share of the blocks."""
    lm = sparse(prefill="blocks", prefill_share=0.5, prefill_mass="none")
    assert (lm.fasa_config.prefill_share, lm.fasa_config.prefill_mass) == (0.5, None)
    words = [3 + number % 50 for number in range(lm.max_length - 20)]
    with lm.account.of("task", "loglikelihood", 1):
        lm._loglikelihood_tokens([(("", "0"), words, words[:10])], disable_tqdm=True)
    counts = lm.account.by("task")["task"].as_dict()
    assert counts["block_queries"] == SPARSE_LAYERS * len(words)
    assert 0 < counts["block_share"] < 1
    assert counts["sparse_queries"] > 0
