"""``--use_cache`` files: lm-eval keys answers by the prompt alone, so a file must belong to one model and budget."""

from __future__ import annotations

import json
from typing import Any

_TABLE = "fasa_hf"
_OWNER = "fasa_hf parameters"


def claim(answers: Any, parameters: dict[str, Any]) -> None:
    """Reserve an opened file for ``parameters``, or refuse it.

    The answers go to a table of their own, which no other model of lm-eval reads: ``--model hf`` on the same file
    later does not take sparse answers for its own.

    Args:
        answers: the file, a ``SqliteDict`` as lm-eval's ``CachingLM`` opened it; it is turned to our table.
        parameters: everything that decides a score.

    Raises:
        ValueError: the file holds answers of another model, or of this one with other parameters.
    """
    mine = json.dumps(parameters, sort_keys=True)
    refusal = ValueError(
        f"the answers in {answers.filename} are another model's, or this one's with other parameters: "
        "give --use_cache a path of its own for each"
    )
    if len(answers):
        raise refusal
    with type(answers)(answers.filename, tablename=_TABLE, autocommit=True) as table:
        if len(table) and table.get(_OWNER) != mine:
            raise refusal
        table[_OWNER] = mine
    answers.tablename = _TABLE
