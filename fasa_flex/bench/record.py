"""Results on disk: where they came from, and every row as soon as it is measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fasa_flex.saving import replace_text


def provenance(command: str, device: torch.device) -> dict[str, Any]:
    """Command, date, machine and versions of a run."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "versions": versions(),
        "revision": revision(),
    }


def command_line(module: str) -> str:
    """How this process was called, with no folder of this machine in it."""
    words = [word for place, word in enumerate(sys.argv[1:]) if (place, word) != (0, "bench")]
    return shlex.join(["python", "-m", module, *(Path(w).name if Path(w).is_absolute() else w for w in words)])


def reason_of(error: Exception) -> str:
    """An error's kind and the first line of its message, which may have none."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}".removesuffix(": ")


def versions() -> dict[str, str]:
    """Of what decides speed."""
    found = {"torch": str(torch.__version__)}
    for name in ("transformers", "fasa-flex", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "fasa-flex":
                found[name] = "source tree"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, threads, and the accelerator if one is used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory"] = properties.total_memory
    return found


def revision() -> str | None:
    """The git revision of this source tree, marked if it has been changed; None outside a repository."""
    folder = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fasa_flex")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Ledger:
    """A JSON file of rows that is written after each of them; a run that was stopped goes on where it was.

    Args:
        path: the file.
        head: what describes the run.
        fresh: begin anew.

    Raises:
        ValueError: the file's rows have other settings, hardware or versions and cannot stand beside new ones; or it is
            no such file, or cannot be written.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "rows": [], "left_out": []}
        if path.exists() and not fresh:
            former = self._read()
            for field in ("settings", "hardware", "versions", "revision"):
                if former.get(field) != json.loads(json.dumps(head.get(field))):
                    raise ValueError(f"{path} holds rows of other {field}; pass --fresh, or another folder as --out.")
            self.data["rows"] = former["rows"]
            self.data["earlier_commands"] = [*former.get("earlier_commands", []), former["command"]]
        self.write()

    def _read(self) -> dict[str, Any]:
        try:
            former = json.loads(self.path.read_text())
            if isinstance(former, dict) and {"rows", "command"} <= set(former):
                return former
            reason = "it has no rows and command"
        except (OSError, ValueError) as error:
            reason = reason_of(error)
        raise ValueError(f"{self.path} holds no results ({reason}); pass --fresh, or another folder as --out.")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a row with these fields is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.rows.append({**row, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        self.write()

    def leave_out(self, key: Mapping[str, Any], reason: str) -> None:
        """Keep that a row was not measured, and why."""
        self.data["left_out"].append({**key, "reason": reason})
        self.write()

    def write(self) -> None:
        """Replace the file in one move."""
        replace_text(self.path, json.dumps(self.data, indent=1) + "\n")
