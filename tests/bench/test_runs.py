"""The benchmark's structure on the smallest run, its files and its command; never its speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.settings import CPU, settings

from fasa_flex import cli
from fasa_flex.bench import op, stages
from fasa_flex.bench.__main__ import main
from fasa_flex.bench.record import RowLedger, command_line, hardware, provenance, reason_of
from fasa_flex.bench.settings import quick

pytestmark = pytest.mark.filterwarnings("error:.past_key_values.*is deprecated:FutureWarning")


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


def test_a_prefill_states_its_parts_and_the_first_token(smallest: Path) -> None:
    data = json.loads((smallest / "bench_prefill_cpu.json").read_text())
    assert [row["context"] for row in data["rows"]] == [512, 768]
    for row in data["rows"]:
        rivals = {rival["name"]: rival for rival in row["rivals"]}
        assert rivals.keys() == {"SDPA", "blocks 5%", "blocks 10%", "blocks 20%", "blocks 30%"}
        assert (rivals["SDPA"]["block_share"], rivals["SDPA"]["limit"]) == (1.0, 1.0)
        for rival in (rivals["blocks 5%"], rivals["blocks 30%"]):
            assert rival["stages"].keys() == {"estimate", "select", "attend"}
            assert 0 < rival["block_share"] < 1 < rival["limit"] <= row["limit"]
            assert rival["limit_share"] == pytest.approx(rival["speedup"] / rival["limit"])
            done = rival["tflop_per_s"] * rival["seconds"]
            assert done * rival["limit"] == pytest.approx(rivals["SDPA"]["tflop_per_s"] * rivals["SDPA"]["seconds"])
        first = row["first_token"]
        assert (first["layers"], first["full_layers"], first["dense_layers"], first["left_out"]) == (2, 2, [0], {})
        assert first["seconds"].keys() == first["speedup"].keys() == {"dense", *list(rivals)[1:]}
    assert "work limit" in data["table"]


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
    RowLedger(tmp_path / "rows.json", head).add({"context": 1})
    again = RowLedger(tmp_path / "rows.json", head)
    assert again.has({"context": 1})
    assert not again.has({"context": 2})
    assert again.data["earlier_commands"] == ["command"]
    assert not RowLedger(tmp_path / "rows.json", head, fresh=True).rows


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
        (
            ["--n-tip", "999", "--shapes", "tiny"],
            "n_tip must be at most 8, the chunks of a head of shape 'tiny', got 999",
        ),
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


def test_a_row_says_where_the_time_of_a_call_goes(smallest: Path) -> None:
    row = json.loads((smallest / "bench_op_cpu.json").read_text())["rows"][0]
    assert list(row["stages"]) == list(stages.STAGES)
    assert sum(stage["share"] for stage in row["stages"].values()) == pytest.approx(1.0)


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


@pytest.mark.parametrize("content", ["[]", "{\n", '{"rows": []}'])
def test_a_file_that_holds_no_results_is_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench_op_cpu.json").write_text(content)
    assert main(["--quick", "--device", "cpu", "--part", "op", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "bench_op_cpu.json holds no results" in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--quick", "--device", "cpu", "--part", "op", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_triton_is_refused_where_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backends in ("triton", "gather,triton"):
        assert main(["--device", "cpu", "--backends", backends, "--out", str(tmp_path)]) == 2
        assert "backend triton needs CUDA, got --device cpu; name gather" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_without_a_sparse_rival_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fasa_flex.bench.rivals.sparse_rivals", lambda settings: {})
    assert main(["--quick", "--device", "cpu", "--part", "op", "--out", str(tmp_path)]) == 2
    assert "part op measured only dense attention; the reasons are above." in capsys.readouterr().err


def test_an_interruption_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = op.measure
    calls: list[int] = []

    def second_interrupted(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr("fasa_flex.bench.op.measure", second_interrupted)
    assert main(["--quick", "--device", "cpu", "--part", "op", "--out", str(tmp_path)]) == 130
    path = tmp_path / "bench_op_cpu.json"
    assert f"stopped: 1 finished rows are in {path}; the same command continues" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["rows"]) == 1
