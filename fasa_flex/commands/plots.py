"""The option ``--plot``: checked before a command computes, drawn afterwards."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasa_flex.saving import check_writable, replacing


def check(file: Path | None) -> None:
    """Refuse a file that could not be drawn; None is no picture.

    Raises:
        ValueError: matplotlib is missing, the file cannot be written, or its format is unknown.
    """
    if file is None:
        return
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; run pip install 'fasa-flex[plots]'.")
    if file.is_dir():
        raise ValueError(f"--plot {file} is a folder; name a file, such as {file / 'picture.png'}.")
    if not file.parent.is_dir():
        raise ValueError(f"--plot {file} needs a folder, but {file.parent} is none; make it, or name another.")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {file} has no known picture format; end it with one of .{', .'.join(sorted(known))}.")
    check_writable(file.parent)


def draw(figure: Any, file: Path) -> None:
    """Save a matplotlib figure, and print the file's name."""
    with replacing(file.parent) as beside:
        figure.savefig(beside / file.name, dpi=150)
    print(f"drawn to {file}", file=sys.stderr)
