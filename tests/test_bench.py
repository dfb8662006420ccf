"""The benchmark's arithmetic, its structure on the smallest run, and its files; never its speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from fasa_flex import cli
from fasa_flex.bench import caches, op, report, rivals, stages, step, timing
from fasa_flex.bench.command import main
from fasa_flex.bench.launches import launches_of
from fasa_flex.bench.limits import amdahl, attention_reads, crossover, project
from fasa_flex.bench.record import Ledger, command_line, hardware, provenance, reason_of
from fasa_flex.bench.settings import Settings, quick
from fasa_flex.bench.shapes import SHAPES, random_chunks, random_profile

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def settings(**changes: object) -> Settings:
    fields = {"device": CPU, "dtype": torch.float32, "shapes": ("tiny",), "contexts": (64,), "batches": (1,)}
    return Settings(**{**fields, **changes})


@pytest.mark.parametrize(("context", "limit"), [(4096, 5.3), (8192, 6.4), (32768, 7.5), (1 << 30, 8.0)])
def test_the_byte_limit_is_the_papers(context: int, limit: float) -> None:
    """1 / (n_tip / d + n_fac / t) with 16 chunks of 64 and 256 tokens."""
    reads = attention_reads(context, 1, 8, 128, 16, 256, itemsize=2)
    assert reads.limit == pytest.approx(1 / (16 / 128 + 256 / context), rel=1e-6)
    assert reads.limit == pytest.approx(limit, abs=0.05)


def test_bytes_of_a_call_counted_by_hand() -> None:
    reads = attention_reads(context=100, batch=3, kv_heads=2, head_dim=16, n_tip=2, n_fac=10, itemsize=4)
    assert reads.dense == 3 * 2 * 100 * 2 * 16 * 4
    assert reads.sparse == 3 * 2 * (100 * 2 * 2 * 4 + 10 * 2 * 16 * 4)


def test_packed_keys_count_in_their_own_bytes_with_their_scales() -> None:
    same, packed = (attention_reads(1000, 1, 1, 64, 8, 10, 4, token) for token in (None, 16 + 4))
    assert same.sparse - packed.sparse == 1000 * (2 * 8 * 4 - 20)


def test_a_budget_of_the_whole_context_reads_what_dense_reads() -> None:
    assert attention_reads(64, 1, 1, 16, 2, 256, 4).limit == 1


def test_amdahl() -> None:
    assert amdahl(step=10, attention=8, limit=4) == pytest.approx(10 / (2 + 2))
    assert amdahl(step=10, attention=8, limit=4, sparse_share=0.5) == pytest.approx(10 / (2 + 4 + 1))
    assert amdahl(step=10, attention=12, limit=4) == pytest.approx(4)  # measured alone it can take longer


@pytest.mark.parametrize(
    ("speedups", "context", "how"),
    [
        ([(1024, 0.5), (4096, 2.0)], 2048, "interpolated"),
        ([(4096, 2.0), (1024, 0.5), (512, 1.5)], 2048, "interpolated"),  # a lucky short one does not count
        ([(1024, 1.5), (4096, 2.0)], None, "below the smallest context measured (1024)"),
        ([(1024, 0.5), (4096, 0.9)], None, "above the largest context measured (4096)"),
    ],
)
def test_crossover(speedups: list[tuple[int, float]], context: int | None, how: str) -> None:
    found = crossover(speedups)
    assert (found.context, found.how) == (context, how)


def test_rounds_are_interleaved_and_begin_with_another_rival() -> None:
    called: list[str] = []

    def rival(name: str) -> Callable[[], None]:
        return lambda: called.append(name)

    times = timing.interleave({name: rival(name) for name in "abc"}, CPU, repeats=3)
    assert "".join(called) == "abc" + "bca" + "cab"
    assert all(len(timing_.seconds) == 3 for timing_ in times.values())


def test_rounds_end_when_time_is_up_but_not_before_a_few() -> None:
    assert len(timing.interleave({"a": lambda: None}, CPU, repeats=100, seconds=0)["a"].seconds) == timing.LEAST_ROUNDS


def test_ratios_are_of_the_same_round() -> None:
    slow_rounds, rival = timing.Timing((1.0, 10.0, 1.0)), timing.Timing((2.0, 20.0, 2.0))
    assert slow_rounds.ratio(rival) == (2, 2, 2)
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0)).quartiles() == (2, 4)


def test_dense_rivals_compute_the_same_and_grouped_sdpa_is_among_them() -> None:
    x = rivals.Inputs.random(TINY, 2, 40, settings())
    expected = torch.softmax(x.q @ x.k.repeat_interleave(2, 1).mT / 4, -1) @ x.v.repeat_interleave(2, 1)
    dense = rivals.dense_rivals(settings(modes=("eager",)))
    assert {"SDPA", "grouped SDPA"} <= set(dense)
    for call in dense.values():
        torch.testing.assert_close(call(x), expected)


def test_a_rival_that_computes_something_else_or_fails_is_left_out() -> None:
    def wrong(x: rivals.Inputs) -> torch.Tensor:
        return 2 * rivals.sdpa(x)

    def broken(x: rivals.Inputs) -> torch.Tensor:
        raise RuntimeError("no kernel")

    x = rivals.Inputs.random(TINY, 1, 40, settings())
    asked = {"SDPA": rivals.sdpa, "wrong": wrong, "broken": broken, "absent": "a reason"}
    good, _, left_out = op._warmed(asked, {"SDPA", "wrong", "broken"}, x)
    assert set(good) == {"SDPA"}
    assert left_out["absent"] == "a reason"
    assert "no kernel" in left_out["broken"]
    assert "differs" in left_out["wrong"]


@pytest.mark.parametrize("packed_dtype", [None, "bfloat16", "int8"])
def test_the_limit_of_a_call_counts_the_packed_keys_that_are_there(packed_dtype: str | None) -> None:
    chosen = settings(n_fac=16, packed_dtype=packed_dtype)
    x = rivals.Inputs.random(TINY, 1, 64, chosen)
    least = {None: 4, "bfloat16": 2, "int8": 1}[packed_dtype] * 2 * 64 * 2 * 2
    assert least <= x.packed.n_bytes <= 2 * least
    assert op.reads_of(x, TINY, chosen).sparse == x.packed.n_bytes + 2 * 16 * 2 * 16 * 4


def test_shapes_state_their_weights() -> None:
    for shape in (TINY, SHAPES["qwen2.5-7b"]):
        small = torch.device("meta") if shape is not TINY else CPU
        model = shape.model(1, 64, torch.float32, small)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert matrices == shape.layer_parameters() + shape.head_parameters()
        assert model.config.num_key_value_heads == shape.kv_heads
    assert SHAPES["llama-3.2-1b"].head_parameters() == 128256 * 2048  # the embedding is the output head
    assert SHAPES["llama-2-7b"].group == 1


def test_random_chunks_and_profile_fit() -> None:
    chunks = random_chunks(TINY, 2, CPU)
    assert chunks.shape == (2, 2, 2)
    assert (chunks[..., 1] - chunks[..., 0] == 8).all()  # planes of a half-split head
    model = TINY.model(2, 64, torch.float32, CPU)
    random_profile(TINY, model, 2).check_fits(model)


def test_a_twin_shares_weights_and_nothing_else() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    other = step.twin(model, 1)
    assert len(other.model.layers) == other.config.num_hidden_layers == 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert other.lm_head.weight is model.lm_head.weight
    assert other.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


def test_a_cache_is_filled_shared_rewound_and_counted() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    cache, other = (StaticCache(config=model.config, max_cache_len=32) for _ in range(2))
    caches.fill(cache, 2, TINY, 3, 31, torch.float32, CPU)
    assert cache.get_seq_length() == 31
    assert caches.share(other, cache, 32)
    assert other.layers[1].keys is cache.layers[1].keys
    caches.rewind(other, 5)
    assert (cache.get_seq_length(), other.get_seq_length()) == (31, 5)
    counters = 2 * 8
    assert caches.nbytes(cache) == {"cpu": 2 * 2 * 3 * 2 * 32 * 16 * 4 + counters}


def test_a_shared_cache_needs_the_same_length() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    cache, longer = (StaticCache(config=model.config, max_cache_len=length) for length in (32, 64))
    caches.fill(cache, 2, TINY, 1, 31, torch.float32, CPU)
    assert not caches.share(longer, cache, 64)


def test_a_projection_to_full_depth() -> None:
    head, dense, sparse = 1.0, 1 + 2 * 3.0, 1 + 2 * 1.0
    found = project(sparse, dense, head, batch=4, layers=(2, 10), sparse=True)
    assert found is not None
    assert found["seconds"] == 1 + 9 * 1 + 3  # layer 0 stays dense
    assert found["speedup"] == pytest.approx((1 + 10 * 3) / 13)
    assert found["tokens_per_s"] == pytest.approx(4 / 13)
    assert project(sparse, dense, head, batch=4, layers=(10, 10), sparse=True) is None


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ``--quick``, both parts."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["--quick", "--part", "all", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("part", ["op", "step"])
def test_the_smallest_run(smallest: Path, part: str) -> None:
    data = json.loads((smallest / f"bench_{part}_cpu.json").read_text())
    assert {"command", "date", "hardware", "python", "versions", "revision", "settings", "quality"} <= set(data)
    assert set(data["bandwidth_gb_per_s"]) == {"copy", "read"}
    assert [row["context"] for row in data["rows"]] == [64, 128]
    for row in data["rows"]:
        names = {rival["name"]: rival for rival in row["rivals"]}
        assert {"SDPA", "grouped SDPA", "FASA-C gather"} <= set(names)
        assert part == "op" or {"FASA-M", "FASA-C fastest"} <= set(names), row["left_out"]
        dense = [rival for rival in row["rivals"] if rival["kind"] == "dense"]
        assert names[row["best_dense"]]["seconds"] == min(rival["seconds"] for rival in dense)
        assert names[row["best_dense"]]["speedup"] == 1
        for rival in row["rivals"]:
            assert rival["quartiles"][0] <= rival["seconds"] <= rival["quartiles"][1]
            assert rival["memory"]["peak"] > 0
            assert rival["error"] < 1e-3
    assert data["table"].count("\n") == 1 + sum(len(row["rivals"]) for row in data["rows"])
    assert data["crossovers"]
    assert (smallest / f"bench_{part}_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_as_many_layers_as_fit_beside_what_transformers_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, chosen = SHAPES["llama-3.1-8b"], settings(shapes=("llama-3.1-8b",), contexts=(32768,))
    free = 40_000_000_000
    monkeypatch.setattr("fasa_flex.bench.step.free_memory", lambda device: free)
    layers = step.layers_that_fit(shape, 1, 32768, chosen)
    repeated = 2 * 32768 * 32 * 128 * 4
    held = shape.layer_parameters() * 4 + 2 * 32768 * 8 * 128 * 4
    assert 1 < layers < 32
    assert shape.head_parameters() * 4 + layers * held + repeated < 0.8 * free
    monkeypatch.setattr("fasa_flex.bench.step.free_memory", lambda device: shape.head_parameters() * 4 + repeated)
    assert step.layers_that_fit(shape, 1, 32768, chosen) == 0


def test_a_decode_step_states_its_depth_and_ceiling(smallest: Path) -> None:
    for row in json.loads((smallest / "bench_step_cpu.json").read_text())["rows"]:
        assert (row["layers"], row["full_layers"], row["dense_layers"]) == (2, 2, [0])
        assert 1 <= row["ceiling"] <= row["limit"]
        assert all(rival["tokens_per_s"] == pytest.approx(1 / rival["seconds"]) for rival in row["rivals"])


def test_the_fastest_way_is_dense_where_that_is_faster(smallest: Path) -> None:
    """And reads what dense attention reads, so its time is one of a dense step."""
    for row in json.loads((smallest / "bench_step_cpu.json").read_text())["rows"]:
        read = {rival["name"]: rival["gb_per_s"] * rival["seconds"] for rival in row["rivals"]}
        assert read["FASA-C fastest"] == pytest.approx(read["grouped SDPA"])
        assert read["FASA-C fastest"] > 1.001 * read["FASA-C gather"]


def test_a_second_run_measures_nothing_again(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((smallest / "bench_op_cpu.json").read_text())["rows"]
    assert main(["--quick", "--device", "cpu", "--out", str(smallest)]) == 0
    assert json.loads((smallest / "bench_op_cpu.json").read_text())["rows"] == before
    capsys.readouterr()
    assert main(["--quick", "--device", "cpu", "--n-tip", "3", "--out", str(smallest)]) == 2
    assert "rows of other settings; pass --fresh" in capsys.readouterr().err


def test_a_ledger_keeps_what_a_killed_run_had(tmp_path: Path) -> None:
    head = {**provenance("command", CPU), "settings": {"n": 1}}
    Ledger(tmp_path / "rows.json", head).add({"context": 1})
    again = Ledger(tmp_path / "rows.json", head)
    assert again.has({"context": 1})
    assert not again.has({"context": 2})
    assert again.data["earlier_commands"] == ["command"]
    assert not Ledger(tmp_path / "rows.json", head, fresh=True).rows


def test_no_time_left_is_said(tmp_path: Path) -> None:
    assert main(["--quick", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 2
    left = json.loads((tmp_path / "bench_op_cpu.json").read_text())["left_out"]
    assert [row["reason"] for row in left] == ["no time left of 0 s"] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "gpt-9"], "unknown shape 'gpt-9'"),
        (["--contexts", "0"], "contexts must be positive"),
        (["--modes", "fast"], "modes must be of eager, compiled"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "device must be cpu or cuda, got 'meta'"),
        (["--repeats", "0"], "repeats must be an integer of at least 1, got 0"),
        (["--row-seconds", "-1"], "seconds for a row must not be negative, got -1.0"),
        (["--layers", "-1"], "layers must be an integer of at least 1, got -1"),
        (["--layers", "0"], "layers must be an integer of at least 1, got 0"),
        (["--n-tip", "0"], "n_tip must be an integer of at least 1, got 0"),
        (["--n-tip", "999", "--shapes", "tiny"], "n_tip must be at most 8 for shape 'tiny'"),
        (["--n-fac", "0"], "n_fac must be an integer of at least 1, got 0"),
        (
            ["--dense-layers", "0,2", "--shapes", "tiny"],
            "dense_layers of 2 layers of shape 'tiny' must be below 2, got 2",
        ),
        (["--dense-layers", "-1"], "each of dense_layers must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_options_end_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", *arguments, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_what_is_no_number_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--contexts", "4k,many"])
    assert "expected numbers such as 4096,32k, got '4k,many'" in capsys.readouterr().err


def test_the_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["fasa-flex", "bench", "--part", "op", "--out", str(tmp_path)])
    assert command_line("fasa_flex.bench") == f"python -m fasa_flex.bench --part op --out {tmp_path.name}"


def test_what_describes_the_machine_names_no_folder() -> None:
    found = json.dumps([hardware(CPU), provenance("command", CPU)])
    assert str(Path.home()) not in found
    assert str(Path(__file__).parent) not in found


def test_the_command_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--shapes", "gpt-9", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "unknown shape 'gpt-9'" in capsys.readouterr().err


def test_quick_is_tiny() -> None:
    smallest = quick(settings(shapes=("llama-3.1-8b",), contexts=(1 << 20,)))
    assert smallest.shapes == ("tiny",)
    assert max(smallest.contexts) <= 128


def test_words_for_crossovers() -> None:
    found = [
        {"shape": "s", "batch": 1, "name": "FASA", "context": 2048, "how": "interpolated"},
        {"shape": "s", "batch": 8, "name": "FASA", "context": None, "how": "above the largest context measured (64)"},
    ]
    first, second = report.sentences(found).splitlines()
    assert first.endswith("from 2048 tokens on (interpolated)")
    assert second.endswith("at a context above the largest context measured (64)")


def test_permuted_keys_give_what_packed_ones_give() -> None:
    chosen = settings(modes=("eager",), backends=("gather", "permuted"), n_fac=16)
    x = rivals.Inputs.random(TINY, 2, 80, chosen)
    sparse = rivals.sparse_rivals(chosen)
    packed, permuted = sparse["FASA-C gather"], sparse["FASA permuted keys"]
    assert not isinstance(packed, str)
    assert not isinstance(permuted, str)
    torch.testing.assert_close(permuted(x.clone()), packed(x))


def test_side_by_side_names_speed_and_share_of_the_limit() -> None:
    def rows(context: int, speedup: float) -> list[dict[str, Any]]:
        rival = {"name": "FASA", "speedup": speedup, "limit_share": speedup / 8}
        return [{"batch": 1, "context": context, "limit": 8.0, "rivals": [rival, {**rival, "name": "other"}]}]

    lines = report.side_by_side({"a": rows(4096, 2.0), "b": rows(4096, 4.0) + rows(512, 1.0)}, "FASA").splitlines()
    assert lines[0] == "| batch | context | a | b |"
    assert lines[2] == "| 1 | 512 | - | 1.00x (12% of 8.0x) |"
    assert lines[3] == "| 1 | 4k | 2.00x (25% of 8.0x) | 4.00x (50% of 8.0x) |"


def test_a_row_says_where_the_time_of_a_call_goes(smallest: Path) -> None:
    row = json.loads((smallest / "bench_op_cpu.json").read_text())["rows"][0]
    assert list(row["stages"]) == list(stages.STAGES)
    assert sum(stage["share"] for stage in row["stages"].values()) == pytest.approx(1.0)


def test_launches_are_counted_with_their_own_time() -> None:
    x = torch.ones(64, 64)
    found = launches_of(lambda: (x @ x).softmax(-1) + x + x, torch.device("cpu"))
    by_name = {entry["name"]: entry for entry in found["longest"]}
    assert by_name["aten::add"]["count"] == 2
    assert by_name["aten::mm"]["count"] == 1
    assert found["seconds"] == pytest.approx(sum(entry["seconds"] for entry in found["longest"]))
    assert found["count"] >= 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no room\nand a stack"), "ValueError: no room"),
        (RuntimeError("\n  late start"), "RuntimeError: late start"),
        (AssertionError(), "AssertionError"),
    ],
    ids=str,
)
def test_a_reason_is_the_first_line_of_an_error_that_may_say_nothing(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
