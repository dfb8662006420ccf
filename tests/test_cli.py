"""The command `fasa-flex`."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fasa_flex import cli


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


def test_the_command_is_installed() -> None:
    found = {script.name: script.value for script in entry_points(group="console_scripts") if script.dist is not None}
    assert found.get("fasa-flex") == "fasa_flex.cli:main"
