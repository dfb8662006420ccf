"""``--use_cache`` files: lm-eval keys answers by prompt only, so each file must belong to one model and budget."""

from __future__ import annotations

import json
from typing import Any

_TABLE = "fasa_hf"
_OWNER = "fasa_hf parameters"


def claim(answers: Any, parameters: dict[str, Any]) -> None:
    """Claim an open cache file for one set of parameters.

    Answers go to a separate SQLite table, so that ``--model hf`` on the same file never reads sparse answers.

    Args:
        answers: a ``SqliteDict`` that lm-eval's ``CachingLM`` opened; its ``tablename`` is changed.
        parameters: everything that decides a score, JSON-ready.

    Raises:
        ValueError: the file holds answers of another model, or of this model with other parameters.
    """
    owner = json.dumps(parameters, sort_keys=True)
    refusal = ValueError(
        f"the answers in {answers.filename} are another model's, or this one's with other parameters; "
        "give --use_cache a path of its own for each."
    )
    if len(answers):
        raise refusal
    with type(answers)(answers.filename, tablename=_TABLE, autocommit=True) as table:
        if len(table) and table.get(_OWNER) != owner:
            raise refusal
        table[_OWNER] = owner
    answers.tablename = _TABLE
