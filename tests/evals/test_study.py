"""The study's figures against definitions written out, its ledger, and both scripts in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.marked import block
from evals.quality import agreement, arms, budgets, calibrations, documents, methods, steps, sweep, tables, zero_setup
from fasa_flex import RotaryLayout, calibrate
from fasa_flex.core.budget import Budget
from fasa_flex.core.layer_budgets import spread_budget
from fasa_flex.lm_eval.arguments import budget_weights

LAYERS, KV_HEADS, GROUP, QUERIES, KEYS, DIMS = 2, 2, 2, 3, 1100, 4


@pytest.fixture
def decoded() -> steps.Steps:
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, length: int) -> Tensor:
        return torch.randn(LAYERS, heads, length, DIMS, generator=generator)

    return steps.Steps(drawn(KV_HEADS * GROUP, QUERIES), drawn(KV_HEADS * GROUP, steps.WINDOW), drawn(KV_HEADS, KEYS))


def sets_of(slots: Tensor, count: int, head: int, query: int) -> set[int]:
    group = min(head % GROUP, slots.shape[2] - 1)
    return set(slots[1, head // GROUP, group, query, :count].tolist())


def test_slots_are_the_best_valid_keys_of_each_query(decoded: steps.Steps) -> None:
    slots = steps.ranked(steps.scored(steps.oracle, decoded), steps.valid_of(decoded))
    for head in range(KV_HEADS * GROUP):
        for query in range(QUERIES):
            keys = decoded.key[1, head // GROUP, : KEYS - QUERIES + query + 1]
            best = (keys @ decoded.query[1, head, query]).argsort(descending=True)[:20]
            assert sets_of(slots, 20, head, query) == set(best.tolist())


def test_overlap_and_held_attention_are_what_they_say(decoded: steps.Steps) -> None:
    valid = steps.valid_of(decoded)
    full = steps.ranked(steps.scored(steps.oracle, decoded), valid)
    shared = steps.ranked(steps.scored(steps.oracle, decoded).amax(2, keepdim=True), valid)
    weights = steps.attention(decoded, 0.5)
    assert weights.sum(-1) == pytest.approx(1.0, abs=1e-5)
    common, mass = steps.overlap(full, shared, 16), steps.held(weights, shared, 16)
    assert common.shape == mass.shape == (LAYERS, KV_HEADS * GROUP)
    for head in range(KV_HEADS * GROUP):
        both = [sets_of(full, 16, head, query) & sets_of(shared, 16, head, query) for query in range(QUERIES)]
        assert float(common[1, head]) == pytest.approx(sum(map(len, both)) / 16 / QUERIES)
        mine = weights[1, head // GROUP, head % GROUP]
        kept = [mine[query, sorted(sets_of(shared, 16, head, query))].sum() for query in range(QUERIES)]
        assert float(mass[1, head]) == pytest.approx(float(sum(kept)) / QUERIES, rel=1e-5)
    assert (steps.overlap(full, full, 16) == 1).all()


def test_found_keeps_the_order_of_the_heads_own_keys() -> None:
    full = torch.tensor([7, 1, 5, 3]).view(1, 1, 1, 1, 4)
    slots = torch.tensor([3, 0, 1, 7]).view(1, 1, 1, 1, 4)
    assert steps.found(full, slots, 4).flatten().tolist() == [1, 1, 0, 1]
    assert steps.found(full, slots, 2).flatten().tolist() == [0, 0]


def test_snapkv_ranks_the_window_then_what_the_window_saw_with_its_neighbours() -> None:
    query, window = torch.zeros(1, 1, 2, 2), torch.tensor([8.0, 0.0]).expand(1, 1, steps.WINDOW, 2)
    key = torch.zeros(1, 1, 1100, 2)
    key[0, 0, 100, 0] = 1.0
    slots = steps.snapkv(steps.Steps(query, window, key), 1.0)[0, 0, 0]
    prompt = 1100 - 2
    assert slots[0, : steps.WINDOW + 1].tolist() == list(range(prompt - steps.WINDOW, prompt + 1))
    assert slots[0, steps.WINDOW + 1 : steps.WINDOW + 8].tolist() == list(range(97, 104))
    assert slots[1, : steps.WINDOW + 2].tolist() == list(range(prompt - steps.WINDOW, prompt + 2))


def test_intervals_are_over_documents() -> None:
    documents = [{"same": torch.full((2, 3), 0.5), "apart": torch.tensor(float(n % 2))} for n in range(16)]
    figures = steps.with_interval(documents)
    assert figures["same"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "documents": 16, "by_layer": [0.5, 0.5]}
    apart = figures["apart"]
    assert apart["mean"] == 0.5
    assert 0.2 < apart["low"] < 0.35
    assert 0.65 < apart["high"] < 0.8
    assert figures == steps.with_interval(documents)


def test_steps_are_those_that_calibration_looks_at() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(arms.MODEL), AutoTokenizer.from_pretrained(arms.MODEL)
    read = steps.steps_of(model, tokenizer, "a document", 600)
    prompt = arms.haystack("a document", 600, tokenizer)
    assert read["text"].key.shape[2] == len(tokenizer(prompt.text).input_ids)
    layout = RotaryLayout.detect(model)
    ours = steps.profile_of(model, [read["answer"]], layout, top_k=64)
    theirs = calibrate(model, [prompt.prompt], 64, arms.ANSWER_TOKENS, progress=False, tokenizer=tokenizer)
    assert ours.provenance.queries == theirs.provenance.queries
    torch.testing.assert_close(ours.agreement, theirs.agreement)
    adjacent = steps.profile_of(model, [read["answer"]], RotaryLayout.interleaved(64), top_k=64)
    assert not torch.equal(adjacent.agreement, ours.agreement)


def test_a_profile_of_several_samples_is_the_mean_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "LENGTH", 464)
    made = calibrations.Calibrations(calibrations.QUICK)
    (mean,) = made.profiles(calibrations.Setting("recall", 2))
    samples = [arms.haystack(f"calibration/{number}", 400, made.tokenizer, made._text).prompt for number in range(2)]
    whole = calibrate(made.model, samples, 256, arms.ANSWER_TOKENS, progress=False, tokenizer=made.tokenizer)
    torch.testing.assert_close(mean.agreement, whole.agreement)
    assert mean.provenance == whole.provenance
    (mixed,) = made.profiles(calibrations.Setting("mixed", 2))
    halves = [made.single("recall", 0, 256).agreement, made.single("text", 1, 256).agreement]
    torch.testing.assert_close(mixed.agreement, (halves[0] + halves[1]) / 2)


def test_a_ledger_measures_each_part_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.json"
    ledger = arms.PartLedger(path, {"command": "first"})
    assert ledger.part("one", {"documents": (2,)}, lambda: [{"score": 1}]) == [{"score": 1}]

    def never() -> list[dict[str, Any]]:
        raise AssertionError("measured again")

    again = arms.PartLedger(path, {"command": "second"})
    assert again.part("one", {"documents": (2,)}, never) == [{"score": 1}]
    with pytest.raises(AssertionError, match="measured again"):
        again.part("one", {"documents": (3,)}, never)
    assert again.part("two", {}, lambda: [{"score": 2}]) == [{"score": 2}]
    record = json.loads(path.read_text())
    assert record["command"] == "second"
    assert {name: part["rows"] for name, part in record["parts"].items()} == {
        "one": [{"score": 1}],
        "two": [{"score": 2}],
    }
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_tasks_of_one_kind_have_accounts_of_their_own() -> None:
    tasks = {"fasa_needle": 0.1, "fasa_copy": 0.2}
    results = {
        "results": {task: {f"{arms.METRICS[task]},none": 0.5} for task in tasks},
        "config": {
            "fasa": {
                "tasks": {t: {"sparse_queries": 3, "kv_share": x, "kv_bytes_share": 2 * x} for t, x in tasks.items()}
            }
        },
        "configs": {task: {"output_type": "generate_until"} for task in tasks},
        "n-samples": {task: {"effective": 7} for task in tasks},
    }
    rows = list(arms.rows_of(arms.Arm("FASA", "fasa_hf", 64), results))
    assert {row["task"]: row["attended"] for row in rows} == tasks
    assert {row["task"]: row["read"] / 2 for row in rows} == tasks


def answered(metric: str, score: float, documents: list[Any], order: list[int]) -> dict[str, Any]:
    """A row of a sweep made of what lm-eval keeps of each document."""
    task = "fasa_ppl" if metric in sweep.POOLED else "fasa_needle"
    row = {
        "task": task,
        "metric": metric,
        "method": "FASA",
        "budget": 64,
        "score": score,
        "attended": 0.1,
        "read": 0.2,
        "sparse_queries": 3,
        "documents": len(documents),
    }
    samples = [{"doc_id": n, "prompt_hash": f"hash {n}", metric: documents[n]} for n in order]
    return sweep.row_of(row, {"samples": {task: samples}})


def test_a_rows_interval_is_over_its_documents() -> None:
    row = answered("exact_match", 0.75, [1.0, 0.0, 1.0, 1.0], [2, 0, 3, 1])
    assert row["by_document"] == [1.0, 0.0, 1.0, 1.0]
    assert (row["kv_share"], row["kv_bytes_share"]) == (0.1, 0.2)
    drawn = sweep.drawn_scores(row)
    assert {0.0, 0.25, 0.5, 0.75, 1.0} == set(drawn)
    assert (drawn == 0.0).mean() == pytest.approx(0.25**4, abs=0.003)  # the one failure, four times
    assert (row["low"], row["high"]) == (0.25, 1.0)


def test_documents_of_a_pooled_metric_weigh_what_they_are_long() -> None:
    ln2 = 0.6931471805599453
    row = answered("bits_per_byte", 7 / 4, [(-1 * ln2, 1), (-6 * ln2, 3)], [0, 1])
    assert row["by_document"] == [1.0, 2.0]
    assert sorted(set(sweep.drawn_scores(row).round(6))) == [1.0, 1.75, 2.0]
    position = answered("token_perplexity", 2.0, [(-ln2, 1), (-2 * ln2, 1)], [0, 1])
    assert sorted(set(sweep.drawn_scores(position).round(3))) == [2.0, 2.828, 4.0]


def test_differences_are_paired_and_prompts_are_compared() -> None:
    better = answered("exact_match", 0.75, [1.0, 0.0, 1.0, 1.0], [0, 1, 2, 3])
    worse = answered("exact_match", 0.5, [1.0, 0.0, 0.0, 1.0], [0, 1, 2, 3])
    assert sweep.difference(better, better) == (0.0, 0.0, 0.0)
    more, low, high = sweep.difference(better, worse)
    assert (more, low, high) == (0.25, 0.0, 0.75)
    with pytest.raises(SystemExit, match="FASA has other prompts of fasa_needle"):
        sweep.difference(better, {**worse, "prompts": "others"})


def test_every_method_has_every_budget_and_no_dense_layer() -> None:
    made = list(methods.arms())
    swept = {(arm.method, arm.budget) for arm in made} - {(methods.OPEN_PAGE, 64)}
    assert swept == {(method, budget) for method in methods.METHODS for budget in methods.BUDGETS}
    assert all(arm.arguments["dense_layers"] == "none" and arm.arguments["n_fac"] == arm.budget for arm in made)
    recent = {arm.budget: arm.arguments["n_recent"] for arm in made if arm.method == "Quest"}
    assert recent == {16: 8, 32: 16, 64: 16, 128: 16, 256: 16}


def test_needs_are_means_over_a_groups_heads() -> None:
    rows = [
        {"method": "keys for 90 %", "layer": layer, "query_head": head, "mean": 100 * layer + head}
        for layer in range(4)
        for head in range(4)
    ]
    others = [{"method": "keys for 90 %", "layer": None, "query_head": None, "mean": 1e6}]
    assert budgets.needs(others + rows)[1] == [100.5, 102.5]


@pytest.mark.parametrize("dense", ["none", "0"])
@pytest.mark.parametrize("spread", budgets.SPREADS)
def test_every_spread_has_the_same_mean(spread: str, dense: str) -> None:
    needed = [[3000.0, 400.0], [190.0, 30.0], [570.0, 880.0], [430.0, 290.0]]
    how = budget_weights(budgets.weights(spread, dense, needed))
    sparse = [layer for layer in range(4) if str(layer) != dense]
    spread_over = spread_budget(Budget(32), how, sparse, 2)
    means = [
        budget.n_fac if isinstance(budget.n_fac, int) else sum(budget.n_fac) / 2 for budget in spread_over.values()
    ]
    assert sum(means) == 32 * len(sparse)
    assert (means == sorted(means)) == (spread in ("even", "rising"))


def test_a_dense_layer_reads_everything() -> None:
    row = {"kv_bytes_share": 0.2}
    parts = {
        name: {"settings": {"arguments": {"dense_layers": layers}}, "rows": [row]}
        for name, layers in {"a": "none", "b": "0", "c": "0+1"}.items()
    }
    assert [row["kv_bytes_all_layers"] for row in budgets.in_all_layers(parts)] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_readme_shows_the_committed_results(name: str) -> None:
    """`python -m evals.quality.tables` writes them."""
    assert block(tables.README.read_text(), name) == tables.TABLES[name]()


def run_in_small(script: Any, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rows of each part, after a second run that has nothing left to measure."""
    monkeypatch.setattr(sys, "argv", [script.__name__, "--quick", "--out", str(folder)])
    script.main()
    parts = json.loads((folder / file).read_text())["parts"]
    for module in (script, documents):  # whichever of them reads documents
        monkeypatch.setattr(module, "steps_of", None, raising=False)
    script.main()
    assert json.loads((folder / file).read_text())["parts"] == parts
    rows = {name: part["rows"] for name, part in parts.items()}
    assert all(row["low"] <= row["mean"] <= row["high"] for part in rows.values() for row in part if "mean" in row)
    return rows


@pytest.mark.slow
def test_dominant_chunks_agree_best_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = run_in_small(agreement, "agreement.json", tmp_path, monkeypatch)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"agreement", "transfer", "mass"}
    rows = {(r["queries"], r["method"], r["chunks"], r["top_k"]): r["mean"] for r in parts["compound"]}
    for kind in steps.KINDS:
        assert rows[kind, "dominant", 8, 64] > rows[kind, "random chunks", 8, 64] + 0.1
        assert rows[kind, "dominant", 16, 64] > rows[kind, "dominant", 8, 64] > rows[kind, "dominant", 2, 64]
        assert rows[kind, "random keys", None, 1024] == pytest.approx(1024 / 1250, abs=0.03)
    for kind in steps.KINDS:
        new = {row["held"]: row["mean"] for row in parts["renewal"] if (row["queries"], row["budget"]) == (kind, 64)}
        assert 0.8 > new["the last step"] > new["the last two steps"]  # of two random draws 0.95 would differ
        assert new["the last step"] > new["the last step, 2 budgets"] > new["the last step, 4 budgets"] > 0.05


@pytest.mark.slow
def test_calibrations_are_compared_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = run_in_small(calibrations, "calibration.json", tmp_path, monkeypatch)
    assert (tmp_path / "calibration.png").exists()
    assert all(8 / 32 < row["in_common"] < 1 for row in parts["overlaps"])  # random sets have 8 / 32
    worth = [row for row in parts["worth"] if row["figure"].startswith("attention held by")]
    by_budget = {n: [row["mean"] for row in worth if row["figure"].endswith(f" {n}")] for n in calibrations.BUDGETS}
    for least, more, most in zip(*by_budget.values(), strict=True):
        assert 0.1 < least < more < most < 1
    assert all(row["poorest"] <= row["mean"] + 1e-4 <= row["best"] + 2e-4 for row in parts["worth"])


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arms_and_dense"), [(methods, 3), (budgets, 2)])
def test_sweeps_go_on_where_they_were(
    script: Any, arms_and_dense: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--quick", "--processes", "1", "--out", str(tmp_path)])
    script.main()
    name = script.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.png").exists()
    parts = json.loads((tmp_path / f"{name}.json").read_text())["parts"]
    rows = [row for part in parts.values() for row in part["rows"]]
    assert len(parts) == arms_and_dense
    assert all(row["low"] <= row["score"] + 1e-5 and row["score"] <= row["high"] + 1e-5 for row in rows)
    assert all((row["kv_bytes_share"] < 0.5) == (row["method"] != "dense") for row in rows)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", _NoWork)
    script.main()
    assert json.loads((tmp_path / f"{name}.json").read_text())["parts"] == parts


class _NoWork:
    """In place of a pool, where nothing is left to measure."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _NoWork:
        return self

    def __exit__(self, *args: object) -> None: ...

    def submit(self, *args: Any) -> None:
        raise AssertionError("measured again")


@pytest.mark.slow
def test_zero_set_up_is_tried_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = run_in_small(zero_setup, "zero_setup.json", tmp_path, monkeypatch)
    assert {row["chunks_from"] for row in parts["needles"]} == set(zero_setup.ARMS)
    assert all(row["mean"] == 1.0 for row in parts["needles"])
    assert all(8 / 32 < row["mean"] < 1 for row in parts["chunks"])  # random sets have 8 / 32
    nats = {(row["chunks_from"], row["budget"]): row["mean"] for row in parts["text"]}
    assert all(nats[arm, 16] > nats[arm, 32] > nats[arm, 64] for arm in zero_setup.ARMS)
    assert nats["ahead", 16] < nats["first prompt", 16]
    assert [row["tokens"] for row in parts["cost"]] == list(zero_setup.LENGTHS)
