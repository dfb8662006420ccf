"""The command `fasa-flex`."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fasa_flex import cli

SHIPPED = Path(__file__).parents[1] / "evals" / "results" / "profile"


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown and command.summary in shown for command in cli.COMMANDS)


def test_a_command_is_one_registration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("word")

    added = cli.Command("say", "say a word", options, lambda given: print(given.word))
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, added))
    assert cli.main(["say", "hello"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_errors_are_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(tmp_path / "nothing"), str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fasa-flex: ")
    assert shown.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main([])


def test_inspect_prints_the_profile_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "profile.png"
    assert cli.main(["inspect", str(SHIPPED), str(SHIPPED), "--n-tip", "6", "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "The 6 dominant chunks of each key/value head" in shown.out
    assert "| all | 1.00 |" in shown.out
    assert str(picture) in shown.err
    assert picture.stat().st_size > 5000
    assert cli.main(["inspect", str(SHIPPED), "--per", "query_head"]) == 0
    assert "The 8 dominant chunks of each query head" in capsys.readouterr().out


def test_inspect_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        assert cli.main(["inspect", *words]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("fasa-flex: ")
        assert shown.count("\n") == 1
        return shown

    assert "n_tip must lie in 1..32" in refused(str(SHIPPED), "--n-tip", "33")
    assert "config.json is missing" in refused(str(tmp_path))

    assert "is no folder to draw x.png in" in refused(str(SHIPPED), "--plot", str(tmp_path / "missing" / "x.png"))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("several\nlines")

    monkeypatch.setattr("fasa_flex.profile.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", unreachable)
    assert "someone/profile is no folder, and the Hub gives no such profile" in refused("someone/profile")


def test_the_command_is_installed() -> None:
    found = {script.name: script.value for script in entry_points(group="console_scripts") if script.dist is not None}
    assert found.get("fasa-flex") == "fasa_flex.cli:main"
