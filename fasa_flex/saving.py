"""Atomic replacement of files: an interrupted, killed or failed write leaves the former files."""

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

_UNFINISHED, _COMPLETE = ".saving-", ".saved-"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of ``folder`` when the block ends.

    Other files of ``folder`` stay. A symlink is replaced, never written through. If the block raises, nothing changes.

    Args:
        folder: the destination; created if it is missing.

    Raises:
        ValueError: the folder cannot be written to, or the block raised an OSError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED, ignore_cleanup_errors=True) as temporary:
            written = Path(temporary)
            yield written
            for file in written.iterdir():
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(EISDIR, f"{file.name} is a folder")
                _sync(file)
            with settled(folder):
                # if this process is killed after the rename, the next reader or writer finishes it
                written.rename(folder / written.name.replace(_UNFINISHED, _COMPLETE, 1))
                _finish(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{folder} cannot be written to ({reason}); choose another folder.") from error


def replace_text(file: Path, text: str) -> None:
    """Replace a text file atomically, in UTF-8.

    Raises:
        ValueError: the file cannot be written.
    """
    with replacing(file.parent) as beside:
        (beside / file.name).write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before computing its contents.

    Raises:
        ValueError: with the reason.
    """
    with replacing(folder):
        pass


@contextmanager
def settled(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against `replacing`, so that the files read in the block belong together.

    First finishes a replacement that was killed half-way. On a file system without locks, a reader may see a
    replacement in progress.
    """
    with _locked(folder):
        with suppress(OSError):  # a reader without write permission takes the files as they are
            _finish(folder)
        yield


def _finish(folder: Path) -> None:
    for complete in folder.glob(f"{_COMPLETE}*"):
        for file in complete.iterdir():
            file.replace(folder / file.name)
        complete.rmdir()


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
        os.close(handle)  # also releases the lock


def _sync(file: Path) -> None:
    with file.open("rb+") as written:
        os.fsync(written.fileno())
