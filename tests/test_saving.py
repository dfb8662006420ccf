"""Replacing files as a whole: killed on any line, beside other writers, over symlinks, where nothing can be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import tiny, token_ids

from fasa_flex import FasaProfile, calibrate
from fasa_flex.saving import check_writable, replace_text, replacing

if not hasattr(os, "fork"):
    pytest.skip("kills and races are made by fork", allow_module_level=True)

WATCHED = ("saving.py", "hub_mixin.py")


@pytest.fixture(scope="module")
def profiles() -> tuple[FasaProfile, FasaProfile]:
    model = tiny("Llama")
    first, second = (
        calibrate(model, [token_ids(40, seed=seed)], top_k=8, max_new_tokens=3, progress=False) for seed in (0, 1)
    )
    assert first.fingerprint != second.fingerprint
    return first, second


def in_child(work: Callable[[], object]) -> int:
    """The process that does the work and ends; 7 if it raises."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(7)
    os._exit(0)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(line: int, work: Callable[[], object]) -> Callable[[], None]:
    """The work, up to the ``line``-th line that runs in the files watched; nothing is cleaned up then."""

    def run() -> None:
        left = [line]

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if Path(frame.f_code.co_filename).name not in WATCHED:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        work()

    return run


def test_killed_on_any_line_a_profile_is_the_old_or_the_new_one(
    profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path
) -> None:
    old, new = profiles
    found = set()
    for line in range(0, 1000, 2):  # every second: nothing on the disk changes on two in a row
        folder = tmp_path / str(line)
        old.save_pretrained(folder)
        ended = status_of(in_child(killed_at(line, lambda folder=folder: new.save_pretrained(folder))))
        assert ended in (0, 9)
        found.add(FasaProfile.from_pretrained(folder).fingerprint)
        if ended == 0:
            break
    else:
        pytest.fail("the work never ended")
    assert found == {old.fingerprint, new.fingerprint}
    new.save_pretrained(folder)  # and what was left is no obstacle
    assert FasaProfile.from_pretrained(folder).fingerprint == new.fingerprint


def test_beside_two_writers_every_read_is_whole(profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path) -> None:
    profiles[0].save_pretrained(tmp_path)
    writers = [
        in_child(lambda profile=profile: [profile.save_pretrained(tmp_path) for _ in range(30)]) for profile in profiles
    ]
    known = {profile.fingerprint for profile in profiles}
    for _ in range(60):
        assert FasaProfile.from_pretrained(tmp_path).fingerprint in known
    assert [status_of(writer) for writer in writers] == [0, 0]
    assert FasaProfile.from_pretrained(tmp_path).fingerprint in known
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "agreement.safetensors", "config.json"}


def test_out_of_space_is_one_sentence_and_loses_nothing(
    profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = profiles
    old.save_pretrained(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_text", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, full)
            with pytest.raises(ValueError, match=r"cannot be written to \(No space left on device\); choose another"):
                new.save_pretrained(tmp_path)
        assert FasaProfile.from_pretrained(tmp_path).fingerprint == old.fingerprint
    assert len(list(tmp_path.iterdir())) == 3


def test_symlinks_are_replaced_and_what_they_name_stays(
    profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path
) -> None:
    """A snapshot of the Hub's cache is symlinks to files that other snapshots share."""
    old, new = profiles
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    old.save_pretrained(blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    new.save_pretrained(snapshot)
    assert FasaProfile.from_pretrained(blobs).fingerprint == old.fingerprint
    assert FasaProfile.from_pretrained(snapshot).fingerprint == new.fingerprint


def test_a_users_model_card_stays(profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    profiles[0].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_profile_is_not_saved_onto_a_file(profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(ValueError, match=r"taken cannot be written to \(File exists\); choose another folder\.$"):
        profiles[0].save_pretrained(taken)
    assert taken.read_text() == "mine"


def test_pushing_saves_here_first_under_the_folders_name(
    profiles: tuple[FasaProfile, FasaProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(self: FasaProfile, **options: Any) -> str:
        assert FasaProfile.from_pretrained(tmp_path / "mine").fingerprint == self.fingerprint
        return f"{options['repo_id']} {options['private']}"

    monkeypatch.setattr(FasaProfile, "push_to_hub", push)
    assert profiles[0].save_pretrained(tmp_path / "mine", push_to_hub=True, private=True) == "mine True"


def test_files_change_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("stays")

    def interrupted() -> None:
        with replacing(tmp_path) as beside:
            (beside / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "other": "stays"}
    with replacing(tmp_path) as beside:
        (beside / "a").write_text("new")
        (beside / "b").write_text("new")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"a": "new", "b": "new", "other": "stays"}


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json" / "inside").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot be written to \(results\.json is a folder\)"):
            replace_text(tmp_path / "results.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to \(Not a directory\); choose another folder\.$"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
