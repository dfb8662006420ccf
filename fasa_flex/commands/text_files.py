"""Text files that commands are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def texts_of(files: Sequence[Path]) -> list[str]:
    """The texts in files.

    Raises:
        ValueError: one that is not there, cannot be read, or is no UTF-8.
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); name one.") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); name a text file.") from error
    return texts
