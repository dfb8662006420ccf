"""What each task really ran on: dense and sparse queries, keys read, documents cut, summed over processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fasa_flex.model.stats import FasaStats

_log = logging.getLogger(__name__)

DENSE = "this result is dense attention"


@dataclass
class Run:
    """The requests of one kind that one task made.

    Attributes:
        task: its name.
        kind: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
        requests: how many were answered here; those that ``--use_cache`` answered are not among them.
        dense_answers: log-likelihood requests all of whose tokens are predicted by dense queries.
        truncated: inputs that lost tokens on the left.
        unfinished: generations that ran into ``max_gen_toks``.
        dense_queries: queries that attended to all keys, over all layers.
        sparse_queries: queries that attended to a selection, over all layers. Rows of a batch go on until its last
            answer ends, and count.
        settings: which criterion, packed dtype and completion ran (`FasaStats.settings`); None for what does not apply
            or was not yet known. A sum names every value that ran.
        selected: keys that sparse queries attended to.
        valid: keys that sparse queries chose from.
        bytes_read: keys and values that sparse queries read, ranking included (`fasa_flex.core.bytes_read`); None if
            not stated, and then in a sum, too.
    """

    task: str
    kind: str
    requests: int = 0
    dense_answers: int = 0
    truncated: int = 0
    unfinished: int = 0
    dense_queries: int = 0
    sparse_queries: int = 0
    settings: dict[str, str | None] = field(default_factory=dict)
    selected: float = 0.0
    valid: float = 0.0
    bytes_read: float | None = 0.0

    def read(self, stats: FasaStats) -> None:
        """Take over what the model counted."""
        self.settings = stats.settings
        for layer in stats.per_layer:
            self.dense_queries += layer.dense_queries
            self.sparse_queries += layer.sparse_queries
            self.selected += layer.mean_selected * layer.sparse_queries
            self.valid += layer.mean_valid * layer.sparse_queries
        share = stats.kv_bytes_share
        self.bytes_read = None if share is None else share * self.valid

    def __add__(self, other: Run) -> Run:
        """Both, under this one's name: counts add up, settings that differ are all named."""
        names = self.settings | other.settings
        return Run(
            self.task,
            self.kind,
            self.requests + other.requests,
            self.dense_answers + other.dense_answers,
            self.truncated + other.truncated,
            self.unfinished + other.unfinished,
            self.dense_queries + other.dense_queries,
            self.sparse_queries + other.sparse_queries,
            {name: _named(self.settings.get(name), other.settings.get(name)) for name in names},
            self.selected + other.selected,
            self.valid + other.valid,
            None if self.bytes_read is None or other.bytes_read is None else self.bytes_read + other.bytes_read,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; ``kv_share`` is what sparse queries attend to, ``kv_bytes_share`` what they read in all."""
        share = self.selected / self.valid if self.valid else None
        read = self.bytes_read / self.valid if self.valid and self.bytes_read is not None else None
        names = ("requests", "dense_answers", "truncated", "unfinished", "dense_queries", "sparse_queries")
        counts = {name: getattr(self, name) for name in names}
        return {"kind": self.kind, **counts, "kv_share": share, "kv_bytes_share": read, **self.settings}

    def warnings(self) -> list[str]:
        """What a reader of the score has to know, in sentences."""
        said = []
        if not self.sparse_queries:
            said.append(
                f"NO SPARSE QUERY in {self.kind} requests of {self.task}, {DENSE}: the budget may cover every context, "
                "continuations of one token may come from the prompt's last query alone (pass sparse_tail=1), "
                "dense_layers may name every layer, or profile=prompt has met no dense prompt of 128 tokens"
            )
        elif self.dense_answers:
            said.append(
                f"{self.dense_answers} of {self.requests} {self.kind} requests of {self.task} were answered by dense "
                "queries alone, since their continuation is one token: pass sparse_tail=1 to decode it sparsely"
            )
        if self.truncated:
            said.append(f"{self.truncated} inputs of {self.task} were too long and lost tokens on the left")
        if self.unfinished:
            said.append(
                f"{self.unfinished} of {self.requests} answers of {self.task} were cut at max_gen_toks: if they were "
                "meant to end by themselves, raise it with --gen_kwargs max_gen_toks=..."
            )
        return said


class Account:
    """All runs of one model.

    Args:
        stats: the model's counters; the account resets them for each run.
    """

    def __init__(self, stats: FasaStats) -> None:
        self._stats = stats
        self._runs: list[Run] = []
        self._everywhere: list[Run] = []
        self._reported = False
        self.current = Run("", "")

    @contextmanager
    def of(self, task: str, kind: str, requests: int) -> Iterator[Run]:
        """Count what happens inside under ``task``; warn where it ends."""
        if self._reported:  # another evaluation begins
            self._runs, self._everywhere, self._reported = [], [], False
        self.current = run = Run(task, kind, requests)
        self._stats.reset()
        yield run
        run.read(self._stats)
        self._runs.append(run)
        for warning in run.warnings():
            _log.warning("fasa_hf: %s", warning)

    def export(self) -> list[dict[str, Any]]:
        """Everything counted here, to be sent to another process."""
        return [asdict(run) for run in self._runs]

    def gathered(self, exports: Iterable[list[dict[str, Any]]]) -> None:
        """Answer from now on with what all processes counted; this process goes on counting its own."""
        self._everywhere = [Run(**fields) for export in exports for fields in export]

    def by(self, name: str) -> dict[str, Run]:
        """Runs added up by their ``task`` or their ``kind``."""
        totals: dict[str, Run] = {}
        for run in self._everywhere or self._runs:
            key = getattr(run, name)
            totals[key] = totals[key] + run if key in totals else run
        return totals

    def reported(self) -> None:
        """All has been told: what comes next is an evaluation of its own."""
        self._reported = True

    def warnings(self) -> list[str]:
        """Of every task, over all processes."""
        runs = self.by("task").values()
        if not runs:
            return ["no request was answered here: what the queries of answers from --use_cache were is not known"]
        return [warning for run in runs for warning in run.warnings()]


def _named(*values: str | None) -> str | None:
    """Each of the values once; None: none is known."""
    return ", ".join(dict.fromkeys(one for value in values if value for one in value.split(", "))) or None
