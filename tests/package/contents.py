"""Whether a wheel and an sdist hold what the repository says, and nothing else: ``python contents.py WHEEL SDIST``.

The wheel: every tracked file of the package, the start-up hook with the line that calls it, metadata. The sdist: every
tracked file that pyproject.toml names for it, so that a wheel and the tests can be made of it alone.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOOK = {"_fasa_flex_startup.py", "fasa_flex_startup.pth"}
SOURCES = ("fasa_flex", "tests", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "noxfile.py")
ALWAYS = {"PKG-INFO", "pyproject.toml", ".gitignore"}  # hatchling adds these to every sdist


def tracked(*paths: str) -> set[str]:
    """Files that git knows below ``paths``."""
    found = [path for path in paths if (ROOT / path).exists()]
    listed = subprocess.run(["git", "ls-files", "-z", *found], cwd=ROOT, check=True, capture_output=True, text=True)
    return {path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()}


def in_wheel(path: Path) -> set[str]:
    """A wheel's files without its own metadata."""
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def in_sdist(path: Path) -> set[str]:
    """An sdist's files, without the folder of its name and version."""
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1] for member in archive if member.isfile()}


def differences(kind: str, got: set[str], wanted: set[str]) -> list[str]:
    """A line for each file that is missing or too much."""
    missing = [f"{kind} lacks {name}" for name in sorted(wanted - got)]
    return missing + [f"{kind} holds {name}, which nothing asks for" for name in sorted(got - wanted)]


def main(wheel: str, sdist: str) -> None:
    """Exit with a list of differences if there are any."""
    package = {name for name in tracked("fasa_flex") if Path(name).name not in HOOK}
    wrong = differences("the wheel", in_wheel(Path(wheel)), package | HOOK)
    wrong += differences("the sdist", in_sdist(Path(sdist)), tracked(*SOURCES) | ALWAYS)
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(package | HOOK)} files in the wheel, {len(tracked(*SOURCES) | ALWAYS)} in the sdist")


if __name__ == "__main__":
    main(*sys.argv[1:])
