"""Counts for each task: dense and sparse queries, keys read, truncated inputs, summed over processes."""

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
    """Counts of one task's requests of one kind.

    Attributes:
        task: the task's name.
        kind: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
        requests: requests that the model answered; answers from ``--use_cache`` are not counted.
        dense_answers: log-likelihood requests whose target tokens are all predicted by dense queries.
        truncated: inputs that lost tokens on the left.
        unfinished: generations that reached ``max_gen_toks`` before a stop string or an end token.
        dense_queries: queries that attended to all keys, summed over layers.
        sparse_queries: queries that attended to selected keys, summed over layers; includes rows of a batch that have
            finished, until the longest answer ends.
        settings: criterion, packed dtype and completion that ran (`FasaStats.settings`); None where one does not apply
            or is not known yet. A sum lists every value that ran.
        selected: keys that sparse queries attended to, summed over queries.
        valid: keys that sparse queries selected from, summed over queries.
        bytes_read: keys and values that sparse queries read, ranking included, in units of one key and value
            (`fasa_flex.core.bytes_read`); None if the method does not state it, also in a sum.
        block_queries: queries of a prefill by blocks, summed over layers.
        block_pairs: pairs of blocks that these attended to.
        causal_pairs: pairs of blocks that dense attention would have attended to.
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
    block_queries: int = 0
    block_pairs: int = 0
    causal_pairs: int = 0

    def read(self, stats: FasaStats) -> None:
        """Add the model's counters."""
        self.settings = stats.settings
        for layer in stats.per_layer:
            self.dense_queries += layer.dense_queries
            self.sparse_queries += layer.sparse_queries
            self.selected += layer.mean_selected * layer.sparse_queries
            self.valid += layer.mean_valid * layer.sparse_queries
            self.block_queries += layer.block_queries
            self.block_pairs += layer.block_pairs
            self.causal_pairs += layer.causal_pairs
        share = stats.kv_bytes_share
        self.bytes_read = None if share is None else share * self.valid

    def __add__(self, other: Run) -> Run:
        """The sum of two runs under the first one's name; settings that differ are listed."""
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
            self.block_queries + other.block_queries,
            self.block_pairs + other.block_pairs,
            self.causal_pairs + other.causal_pairs,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready counts.

        ``kv_share``: share of keys attended to, ``kv_bytes_share``: read, ranking included; after a prefill by blocks
        ``block_share``: share of the pairs of blocks attended to.
        """
        share = self.selected / self.valid if self.valid else None
        read = self.bytes_read / self.valid if self.valid and self.bytes_read is not None else None
        names = ("requests", "dense_answers", "truncated", "unfinished", "dense_queries", "sparse_queries")
        counts = {name: getattr(self, name) for name in names}
        blocks = {"block_queries": self.block_queries, "block_share": self.block_pairs / max(1, self.causal_pairs)}
        counts |= blocks if self.block_queries else {}
        return {"kind": self.kind, **counts, "kv_share": share, "kv_bytes_share": read, **self.settings}

    def warnings(self) -> list[str]:
        """Sentences that a reader of the score needs to know."""
        sentences = []
        if not self.sparse_queries and not self.block_queries:
            sentences.append(
                f"NO SPARSE QUERY in {self.kind} requests of {self.task}, {DENSE}: the budget may cover every context, "
                "continuations of one token may come from the prompt's last query alone (pass sparse_tail=1), "
                "dense_layers may name every layer, or profile=prompt has met no dense prompt of 128 tokens"
            )
        elif self.dense_answers:
            sentences.append(
                f"{self.dense_answers} of {self.requests} {self.kind} requests of {self.task} were answered by dense "
                "queries alone, since their continuation is one token: pass sparse_tail=1 to decode it sparsely"
            )
        if self.truncated:
            sentences.append(f"{self.truncated} inputs of {self.task} were too long and lost tokens on the left")
        if self.unfinished:
            sentences.append(
                f"{self.unfinished} of {self.requests} answers of {self.task} were cut at max_gen_toks: if they were "
                "meant to end by themselves, raise it with --gen_kwargs max_gen_toks=..."
            )
        return sentences


class Account:
    """The runs of one model, since the last report.

    Args:
        stats: the model's counters; reset at the start of each run.
    """

    def __init__(self, stats: FasaStats) -> None:
        self._stats = stats
        self._runs: list[Run] = []
        self._everywhere: list[Run] = []
        self._reported = False
        self.current = Run("", "")

    @contextmanager
    def of(self, task: str, kind: str, requests: int) -> Iterator[Run]:
        """Count the block's queries under ``task``; log its warnings when it ends."""
        if self._reported:  # a new evaluation starts
            self._runs, self._everywhere, self._reported = [], [], False
        self.current = run = Run(task, kind, requests)
        self._stats.reset()
        yield run
        run.read(self._stats)
        self._runs.append(run)
        for warning in run.warnings():
            _log.warning("fasa_hf: %s", warning)

    def export(self) -> list[dict[str, Any]]:
        """This process's runs, to be sent to another process."""
        return [asdict(run) for run in self._runs]

    def gathered(self, exports: Iterable[list[dict[str, Any]]]) -> None:
        """Set the runs of all processes, which `by` and `warnings` then report; this process keeps counting its own."""
        self._everywhere = [Run(**fields) for export in exports for fields in export]

    def by(self, name: str) -> dict[str, Run]:
        """Sums of runs with the same ``task`` or the same ``kind``, whichever ``name`` says."""
        totals: dict[str, Run] = {}
        for run in self._everywhere or self._runs:
            key = getattr(run, name)
            totals[key] = totals[key] + run if key in totals else run
        return totals

    def reported(self) -> None:
        """Note that the results were reported; the next run starts a new account."""
        self._reported = True

    def warnings(self) -> list[str]:
        """Warnings of every task, over all processes."""
        runs = self.by("task").values()
        if not runs:
            return ["every answer came from --use_cache, so its queries, dense or sparse, were not counted"]
        return [warning for run in runs for warning in run.warnings()]


def _named(*values: str | None) -> str | None:
    """The distinct values, joined by commas; None if none is known."""
    return ", ".join(dict.fromkeys(one for value in values if value for one in value.split(", "))) or None
