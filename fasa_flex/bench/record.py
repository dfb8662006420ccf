"""Results on disk: command, machine and versions, and every row as soon as it is measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fasa_flex.calibration.provenance import version_of
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
    """The command of this process, with absolute paths cut to their last part."""
    words = [word for place, word in enumerate(sys.argv[1:]) if (place, word) != (0, "bench")]
    return shlex.join(["python", "-m", module, *(Path(w).name if Path(w).is_absolute() else w for w in words)])


def reason_of(error: Exception) -> str:
    """An error's type and the first line of its message, if it has one."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}".removesuffix(": ")


def versions() -> dict[str, str]:
    """Versions of the packages that decide speed, as far as they are installed."""
    found = {"torch": str(torch.__version__), "fasa-flex": version_of("fasa-flex", missing="source tree")}
    found |= {name: version_of(name, missing="") for name in ("transformers", "triton")}
    found["cuda"] = torch.version.cuda or ""
    return {name: version for name, version in found.items() if version}


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, and the GPU if ``device`` is one."""
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
    """The git revision of this source tree, with a mark if files are changed; None outside a repository."""
    folder = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fasa_flex")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


class RowLedger:
    """A JSON file of rows of one setting, written after each of them, so that a stopped run can be continued.

    Args:
        path: the file.
        head: description of the run, such as `provenance` and settings.
        fresh: drop the rows of an existing file.

    Raises:
        ValueError: the file's rows have other settings, hardware, versions or revision, or it is no such file or cannot
            be written.
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
        """The rows measured so far."""
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a row with these fields."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append({**row, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        self.write()

    def leave_out(self, key: Mapping[str, Any], reason: str) -> None:
        """Note a row that was not measured, with the reason, and write the file."""
        self.data["left_out"].append({**key, "reason": reason})
        self.write()

    def write(self) -> None:
        """Replace the file atomically."""
        replace_text(self.path, json.dumps(self.data, indent=1) + "\n")
