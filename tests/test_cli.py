"""The command `fasa-flex`."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import token_ids
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import fasa_flex
from fasa_flex import FasaConfig, FasaProfile, cli
from fasa_flex.commands.generate import agreement, side_by_side

SHIPPED = Path(__file__).parents[1] / "evals" / "results" / "profile"


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())  # argparse breaks long lines
    assert all(f"{command.name} {command.summary}" in shown for command in cli.COMMANDS)


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
    kept = FasaConfig().chunks_of(64)
    assert f"The {kept} dominant chunks of each query head" in capsys.readouterr().out


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

    assert "is none; make it" in refused(str(SHIPPED), "--plot", str(tmp_path / "missing" / "x.png"))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("several\nlines")

    monkeypatch.setattr("fasa_flex.calibration.profile.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", unreachable)
    assert "someone/profile is no folder, and the Hub gives no such profile" in refused("someone/profile")


def test_the_command_is_installed() -> None:
    found = {script.name: script.value for script in entry_points(group="console_scripts") if script.dist is not None}
    assert found.get("fasa-flex") == "fasa_flex.cli:main"


WORDS_THAT_WAIT_FOR_NOTHING = [
    ["--help"],
    [],
    ["sing"],
    ["bench", "--help"],
    ["bench", "--contexts", "many"],
    ["inspect"],
    ["inspect", "x", "--per", "layer"],
    ["compare", "--draws", "many"],
    ["calibrate", "model"],
    ["calibrate", "model", "out", "--text", "missing.txt"],
    ["generate", "model", "--prompt", "missing.txt"],
    ["generate", "model", "--prompt", "x", "--n-fac", "some"],
]


def test_help_and_wrong_words_import_nothing_heavy() -> None:
    """They took 8 to 13 seconds; each is a line of the answer, and so is what it has imported."""
    code = """
import sys
from fasa_flex import cli
for words in eval(sys.argv[1]):
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    heavy = {"torch", "transformers", "numpy", "matplotlib", "huggingface_hub"} & set(sys.modules)
    assert code == (0 if "--help" in words else 2), (words, code)
    assert not heavy, (words, heavy)
"""
    root = Path(fasa_flex.__file__).parents[1]
    words = repr(WORDS_THAT_WAIT_FOR_NOTHING)
    done = subprocess.run([sys.executable, "-c", code, words], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_every_public_name_is_there_when_asked_for() -> None:
    assert set(fasa_flex.__all__) <= set(dir(fasa_flex))
    assert all(getattr(fasa_flex, name).__name__ == name for name in fasa_flex._HOMES)
    assert {*fasa_flex._HOMES, "__version__"} == set(fasa_flex.__all__)
    assert fasa_flex.__version__.startswith("0")
    with pytest.raises(AttributeError, match="no attribute 'enabled'"):
        _ = fasa_flex.enabled


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main([*words]) == 2
    *progress, shown = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fasa-flex: .*\.", shown)
    assert not any("Traceback" in line for line in progress)
    return shown


def test_a_picture_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasa_flex.report.inspection.report", lambda *_: pytest.fail("the work was done"))
    inspect = ("inspect", str(SHIPPED), "--plot")
    (tmp_path / "file").write_text("")
    assert "is none; make it" in refused(capsys, *inspect, str(tmp_path / "file" / "x.png"))
    assert "is a folder; name a file, such as" in refused(capsys, *inspect, str(tmp_path))
    for name in ("picture", "picture.doc"):
        assert "has no known picture format" in refused(capsys, *inspect, str(tmp_path / name))
    with monkeypatch.context() as patch:
        patch.setattr(
            "fasa_flex.commands.plots.check_writable", lambda folder: (_ for _ in ()).throw(ValueError("full."))
        )
        assert "full" in refused(capsys, *inspect, str(tmp_path / "x.png"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "fasa_flex.commands.plots.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert "needs matplotlib, which is not installed; run pip install" in refused(
        capsys, *inspect, str(tmp_path / "x.png")
    )
    assert "needs matplotlib" in refused(capsys, "compare", "run", "--plot", str(tmp_path / "x.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("wait", "wait", lambda parser: None, interrupted),))
    assert cli.main(["wait"]) == 130
    assert capsys.readouterr().err == "fasa-flex: interrupted.\n"


@pytest.fixture
def checkpoint(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(length: int, seed: int = 0) -> str:
    return " ".join(f"w{number}" for number in token_ids(length, seed=seed).tolist())


@pytest.mark.parametrize("repeated", [False, True])
def test_calibrate_saves_what_calibrate_finds(
    checkpoint: str, llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], repeated: bool
) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, file in enumerate(files):
        file.write_text(words(50, seed))
    out, options = tmp_path / "profile", ["--top-k", "8", "--max-new-tokens", "2", "--length", "40", "--device", "cpu"]
    texts = ["--text", str(files[0]), *["--text"][: int(repeated)], str(files[1])]
    assert cli.main(["calibrate", checkpoint, str(out), *texts, *options]) == 0
    assert f"is in {out}" in capsys.readouterr().out
    samples = [token_ids(50, seed=seed)[:40] for seed in (0, 1)]
    expected = fasa_flex.calibrate(llama, samples, top_k=8, max_new_tokens=2, progress=False)
    found = FasaProfile.from_pretrained(out)
    assert torch.equal(found.agreement, expected.agreement)
    assert found.provenance.sample_hashes == expected.provenance.sample_hashes
    assert "belongs to something else" in refused(capsys, "calibrate", checkpoint, checkpoint, "--text", str(files[0]))
    short = refused(capsys, "calibrate", checkpoint, str(out), "--text", str(files[0]), "--device", "cpu")
    assert "calibration needs at least 256" in short


def test_generate_streams_and_compares(
    checkpoint: str, llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, profile = tmp_path / "prompt.txt", tmp_path / "profile"
    prompt.write_text(words(60))
    made = fasa_flex.calibrate(llama, [token_ids(40)], top_k=8, max_new_tokens=2, progress=False)
    made.save_pretrained(profile)
    shared = ["generate", checkpoint, "--prompt", str(prompt), "--max-new-tokens", "6", "--device", "cpu"]
    assert cli.main([*shared, "--profile", str(profile), "--n-fac", "8", "--n-tip", "2", "--compare", "dense"]) == 0
    shown = capsys.readouterr().out
    with torch.no_grad():
        ids = token_ids(60)[None]
        dense = llama.generate(ids, max_new_tokens=6, do_sample=False)[0, 60:].tolist()
        with fasa_flex.enable(llama, made, FasaConfig(n_fac=8, n_tip=2)) as fasa:
            sparse = llama.generate(ids, max_new_tokens=6, do_sample=False)[0, 60:].tolist()
    assert sparse != dense
    streamed, columns, parted, table = re.split(r"\n\n+", shown.strip("\n"), maxsplit=3)
    spoken = [f"w{token}" for token in sparse if token > 2]
    assert streamed.split() == spoken
    assert " ".join(line.partition(" | ")[0].strip() for line in columns.splitlines()[2:]).split() == spoken
    same = next(at for at, pair in enumerate(zip(sparse, dense, strict=True)) if len(set(pair)) > 1)
    assert parted == f"Both write the same {same} tokens, then they part."
    assert re.search(rf"\| fasa \| 6 \| [\d.]+ \| [\d.]+ \| {100 * fasa.stats.kv_share:.1f} % \|", table)
    assert re.search(r"\| dense \| 6 \| [\d.]+ \| [\d.]+ \| all \|", table)


def test_generate_says_where_nothing_was_sparse_and_refuses_in_a_sentence(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(words(20))
    shared = ["generate", checkpoint, "--device", "cpu", "--prompt"]
    assert cli.main([*shared, str(prompt), "--max-new-tokens", "2"]) == 0
    assert "no query was sparse, this is dense attention" in capsys.readouterr().err
    assert "the prompt has 20 tokens and 9000 are to follow" in refused(
        capsys, *shared, str(prompt), "--max-new-tokens", "9000"
    )
    assert "the tokenizer has no chat template; leave --chat out" in refused(capsys, *shared, str(prompt), "--chat")
    monkeypatch.setattr("sys.stdin.read", lambda: "", raising=False)
    assert "the prompt is empty" in refused(capsys, *shared, "-")
    assert "no model can be loaded" in refused(capsys, "generate", str(tmp_path), "--prompt", str(prompt))


def test_columns_and_agreement_written_out() -> None:
    texts = {"one": "to be or not to be\n\nthat is", "other": "to be"}
    lines = side_by_side(texts, 35).splitlines()
    assert lines == [
        "one              | other",
        "---------------- | ----------------",
        "to be or not to  | to be",
        "be               |",
        "                 |",
        "that is          |",
    ]
    assert agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 2])) == "Both write the same 2 tokens, and one goes on."
    assert agreement(torch.tensor([1, 2]), torch.tensor([1, 3])) == "Both write the same 1 tokens, then they part."


def test_env_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["transformers"]
    assert facts["backend auto"] == ("gather" if not torch.cuda.is_available() else facts["backend auto"])
    assert str(Path.home()) not in "".join(facts.values())
