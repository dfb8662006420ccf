"""Files that are replaced as a whole: whoever is killed, interrupted or out of space leaves the former ones."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_BEGUN, _WHOLE = ".saving-", ".saved-"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder; the files written to it become those of ``folder`` when the block ends, all at once.

    Other files of ``folder`` stay. A symlink is replaced, never written through. Nothing changes if the block raises.

    Args:
        folder: made where it is missing.

    Raises:
        ValueError: the folder cannot be written to; an OSError of the block counts as such.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_BEGUN, ignore_cleanup_errors=True) as beside:
            begun = Path(beside)
            yield begun
            for file in begun.iterdir():
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(EISDIR, f"{file.name} is a folder")
                _sync(file)
            with settled(folder):
                begun.rename(folder / begun.name.replace(_BEGUN, _WHOLE, 1))  # killed behind this, others finish it
                _finish(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{folder} cannot be written to ({reason}); choose another folder.") from error


def replace_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 as `replacing` does.

    Raises:
        ValueError: it cannot be written.
    """
    with replacing(file.parent) as beside:
        (beside / file.name).write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before the work that is to be kept there.

    Raises:
        ValueError: one sentence with the reason.
    """
    with replacing(folder):
        pass


@contextmanager
def settled(folder: Path) -> Iterator[None]:
    """Hold every `replacing` of ``folder`` off, so that the files read in the block belong together.

    A replacement that was killed between its files is finished first. Where the file system has no locks, a reader may
    meet one that is under way.
    """
    with _locked(folder):
        with suppress(OSError):  # a reader that may not write takes what is there
            _finish(folder)
        yield


def _finish(folder: Path) -> None:
    for whole in folder.glob(f"{_WHOLE}*"):
        for file in whole.iterdir():
            file.replace(folder / file.name)
        whole.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which gives the lock back


def _sync(file: Path) -> None:
    with file.open("rb+") as written:
        os.fsync(written.fileno())
