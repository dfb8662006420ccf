"""The training and held-out text of the reference model: the standard library of the running Python.

``python -m evals.reference_model.corpus`` rebuilds the package's held-out text from the running Python.
"""

from __future__ import annotations

import gzip
import sysconfig
from pathlib import Path

HELDOUT = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "fractions.py",
    "heapq.py",
    "shelve.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
"""Modules that make up the held-out text, relative to the standard library."""

DROPPED = ("optparse.py", "getopt.py", "distutils/fancy_getopt.py", "distutils/text_file.py", "idlelib/config.py")
"""Modules in neither part, since they resemble a held-out module."""

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
SKIPPED_FOLDERS |= {"pydoc_data", "ensurepip"}
"""Folders that are left out: third-party code, tests and tables."""

HELDOUT_FILE = Path(__file__).parents[2] / "fasa_flex" / "lm_eval" / "data" / "heldout.txt.gz"


def stdlib() -> Path:
    """The standard library's folder."""
    return Path(sysconfig.get_paths()["stdlib"])


def read(names: list[str] | tuple[str, ...]) -> str:
    """The modules' sources in one string, each with a final line end."""
    sources = ((stdlib() / name).read_text(encoding="utf-8", errors="replace") for name in names)
    return "".join(source.rstrip("\n") + "\n\n" for source in sources)


def training_modules() -> list[str]:
    """Names of the modules to train on, sorted, relative to the standard library."""
    root = stdlib()
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (name.as_posix() for name in names if not SKIPPED_FOLDERS & set(name.parts))
    return sorted(n for n in kept if n not in {*HELDOUT, *DROPPED} and not n.startswith("_sysconfigdata"))


def training_text() -> str:
    """All training modules in one string."""
    return read(training_modules())


def write_heldout(path: Path = HELDOUT_FILE) -> None:
    """Write the held-out text, compressed, without a time stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(read(HELDOUT).encode(), mtime=0))


if __name__ == "__main__":
    write_heldout()
