"""Pictures that commands are asked for with ``--plot``: refused before the work, drawn behind it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasa_flex.saving import check_writable, replacing


def check(file: Path | None) -> None:
    """Refuse a picture that could not be drawn; None is none.

    Raises:
        ValueError: no matplotlib, a folder, a place that cannot be written to, or a format that is not known.
    """
    if file is None:
        return
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; run pip install 'fasa-flex[plots]'.")
    if file.is_dir():
        raise ValueError(f"--plot {file} is a folder; name a file, such as {file / 'picture.png'}.")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder to draw {file.name} in; make it, or name another.")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {file} names no format of pictures; end it with one of .{', .'.join(sorted(known))}.")
    check_writable(file.parent)


def draw(figure: Any, file: Path) -> None:
    """Put matplotlib's figure into a file, and say so."""
    with replacing(file.parent) as beside:
        figure.savefig(beside / file.name, dpi=150)
    print(f"drawn to {file}", file=sys.stderr)
