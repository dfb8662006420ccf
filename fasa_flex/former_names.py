"""Imports by the names that modules had before they moved into sub-packages.

The former and the current name give the same module object, so that a patch under one name is seen under the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_PACKAGE = __package__
FORMER = {
    "agreement": "calibration.agreement",
    "attention": "backends.attention",
    "boundary": "hf.boundary",
    "budget": "core.budget",
    "cache": "caches.fasa_cache",
    "choices": "core.option_types",
    "commands.calibrating": "commands.calibrate",
    "commands.drawing": "commands.plots",
    "commands.environment": "commands.env",
    "commands.generating": "commands.generate",
    "commands.texts": "commands.text_files",
    "compare": "report.compare",
    "compiling": "backends.specialization",
    "completion": "core.completion",
    "config": "core.config",
    "covering": "backends.triton.completion",
    "criteria": "core.criteria",
    "core.inductor": "core.compiler",
    "core.operators": "core.compiler",
    "crossover": "model.crossover",
    "decode": "backends.triton.decode",
    "dense": "backends.triton.dense",
    "expectations": "hf.compatibility",
    "fused": "backends.triton.dispatch",
    "generating": "hf.generation",
    "grouped": "backends.dense",
    "handed": "hf.forward_checks",
    "handle": "model.handle",
    "held_rows": "core.resident_rows",
    "host_layers": "caches.host_layers",
    "host_memory": "caches.pinned_memory",
    "inspection": "report.inspection",
    "kernels": "backends.triton.kernels",
    "kernels.covering": "backends.triton.kernels.completion",
    "layers": "hf.model_structure",
    "loading": "hf.loading",
    "masking": "hf.masks",
    "operators": "core.compiler",
    "packed_layers": "caches.packed_layers",
    "packing": "core.packed_keys",
    "plots": "report.plots",
    "probe": "hf.probe",
    "profile": "calibration.profile",
    "prompt_calibration": "calibration.from_prompt",
    "provenance": "calibration.provenance",
    "ranked": "backends.triton.tip",
    "ranking": "core.ranking",
    "reads": "core.bytes_read",
    "realize": "core.compiler",
    "reference": "core.reference",
    "room": "caches.capacity",
    "rotary": "calibration.rotary",
    "rows": "backends.gather",
    "scoring": "core.scoring",
    "seam": "hf.attention_routing",
    "selection": "core.selection",
    "softmax": "core.softmax",
    "spread": "core.layer_budgets",
    "stats": "model.stats",
    "tables": "calibration.chunk_tables",
    "tip": "calibration.profile_scorers",
    "transformers": "model.enable",
    "wrappers": "hf.wrappers",
    "writing": "backends.triton.writing",
    "written": "caches.write_tracking",
}


def current_name(name: str) -> str | None:
    """Translate a former name, ``fasa_flex.seam`` to ``fasa_flex.hf.attention_routing``; None for other names."""
    parts = name.split(".")
    if parts[0] != _PACKAGE:
        return None
    for count in range(len(parts), 1, -1):
        former = ".".join(parts[1:count])
        if former in FORMER:
            return ".".join([_PACKAGE, FORMER[former], *parts[count:]])
    return None


class FormerNames(MetaPathFinder, Loader):
    """Import finder for former names; it comes last in ``sys.meta_path`` so that it hides no current module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former name, with this object as its loader; None for other names."""
        return None if current_name(fullname) is None else spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Replace ``module`` in ``sys.modules`` by the module of the current name."""
        current = current_name(module.__name__)
        assert current is not None
        sys.modules[module.__name__] = import_module(current)
