"""Division of a run's documents among several processes on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.quality.real_arms import Arm, Lengths

Job = tuple[Any, int, int, int]
"""Kind, length and number of a document, and the number of such documents."""


def divided(
    jobs: list[Job], arms: dict[str, Arm], lengths: Lengths, number: int, of: int
) -> tuple[list[Job], dict[str, Arm]]:
    """Jobs and arms of process ``number`` of ``of``.

    Arms that evict are divided, and each process has all documents: documents of equal shape are decoded together in
    about the time of one. Otherwise each process has all arms, and documents of about equal cost.
    """
    sparse = [name for name, arm in arms.items() if arm.config is not None]
    if sparse and all(arms[name].evicts for name in sparse):
        return jobs, {"dense": arms["dense"], **{name: arms[name] for name in sparse[number::of]}}
    return _shared(jobs, arms, lengths, of)[number], arms


def _shared(jobs: list[Job], arms: dict[str, Arm], lengths: Lengths, of: int) -> list[list[Job]]:
    """Jobs of about equal cost for each of ``of`` processes: each job, longest first, goes to the least busy one."""

    def cost(job: Job) -> int:
        reached = [arm for arm in arms.values() if arm.reaches(*job[:3], lengths)]
        each = 3 if job[0] == "windows" else 1
        return sum(each * (20 if arm.evicts else 1) for arm in reached)

    loads, parts = [0] * of, [set[Job]() for _ in range(of)]
    for job in sorted(jobs, key=cost, reverse=True):
        least = loads.index(min(loads))
        loads[least] += cost(job)
        parts[least].add(job)
    return [[job for job in jobs if job in part] for part in parts]


def shard_file(out: Path, number: int, of: int) -> Path:
    """The result file of process ``number`` of ``of``."""
    return out.with_name(f"{out.stem}.{number}of{of}.json")
