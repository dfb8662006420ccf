"""Take every class of the installed transformers through the matrix, in processes of their own with a time limit.

    python tests/sweep/run.py --out FOLDER [--workers 2] [CLASS ...]

Each class leaves a JSON file in the folder; a run that is started again goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from sweep import build, matrix

LIMIT = 180
"""Seconds that one class may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("classes", nargs="*", help="classes to examine; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each class")
    parser.add_argument("--quick", action="store_true", help="greedy generation alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = options.classes or build.class_names()
    todo = list(names)
    running: dict[int, tuple[str, float]] = {}
    while todo or running:
        while todo and len(running) < options.workers:
            name = todo.pop(0)
            if not options.classes and _file(options.out, name).exists():
                continue
            running[_start(name, options.out, options.quick)] = (name, time.monotonic())
        time.sleep(0.05)
        for process, (name, begun) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended and time.monotonic() - begun > options.limit:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                _write(options.out, _broken(name, f"not finished in {options.limit:.0f} seconds"))
            elif ended and status and not _file(options.out, name).exists():
                _write(options.out, _broken(name, f"its process ended with status {status}"))
            elif not ended:
                continue
            del running[process]
            record = json.loads(_file(options.out, name).read_text())
            print(f"{record['status']:9} {name}: {record['reason']}"[:300], flush=True)


def _start(name: str, out: Path, quick: bool) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        _write(out, matrix.examine(name, quick))
        status = 0
    finally:
        os._exit(status)


def _broken(name: str, reason: str) -> dict[str, object]:
    return {**matrix.asdict(matrix.Record(name)), "status": "raw", "reason": reason}


def _file(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def _write(out: Path, record: dict[str, object]) -> None:
    part = _file(out, str(record["name"])).with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(_file(out, str(record["name"])))


if __name__ == "__main__":
    main()
