"""Reading of the text files that a command names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def texts_of(files: Sequence[Path]) -> list[str]:
    """The texts of files.

    Raises:
        ValueError: a file that is missing, unreadable or not in UTF-8.
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); name a text file.") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); name a text file.") from error
    return texts
