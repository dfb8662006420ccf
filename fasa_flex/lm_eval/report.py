"""The entry ``fasa`` of lm-eval's results: the settings that decide a sparse score, and counts of its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.models.huggingface import HFLM

from fasa_flex.calibration.provenance import version_of
from fasa_flex.core.config import FasaConfig
from fasa_flex.lm_eval.account import Account
from fasa_flex.lm_eval.profiles import Calibration
from fasa_flex.model.handle import Fasa


@dataclass(frozen=True)
class Setup:
    """Method, budget and calibration of an evaluated model: all that decides a score beside the model itself.

    Attributes:
        method: ``fasa`` or a baseline.
        config: budget and options.
        head_dim: dimensions of a head.
        fasa: the handle that `enable` returned.
        calibration: the profile, and where it came from.
        sparse_tail: a prompt's last queries that are sparse.
        dense_prefix: dense queries at the start of a rolling window.
    """

    method: str
    config: FasaConfig
    head_dim: int
    fasa: Fasa
    calibration: Calibration
    sparse_tail: int
    dense_prefix: int

    def parameters(self) -> dict[str, Any]:
        """The settings, JSON-ready; defaults are written as the values that they take for this model."""
        return {
            "method": self.method,
            **self.config.to_dict(),
            **self.fasa.settings,
            "n_tip": self.config.chunks_of(self.head_dim),
            "profile": self.calibration.fingerprint,
            "sparse_tail": self.sparse_tail,
            "dense_prefix": self.dense_prefix,
        }


def loaded_as(lm: HFLM) -> dict[str, Any]:
    """The settings that decide an answer of the model under dense attention, JSON-ready."""
    names = ["pretrained", "revision", "peft", "delta", "max_length", "truncation", "add_bos_token", "prefix_token_id"]
    names += ["gguf_file"] if getattr(lm, "gguf_file", None) is not None else []
    names += ["softmax_dtype", "mixed_precision_dtype", "enable_thinking", "chat_template_args", "on_truncation"]
    return {"dtype": str(lm.model.dtype), **{name: str(getattr(lm, name, None)) for name in names}}


def report_of(setup: Setup, account: Account, shared_prefills: int, processes: int) -> dict[str, Any]:
    """Settings, calibration, versions, and each task's counts of queries and bytes read, JSON-ready.

    Args:
        setup: the settings.
        account: the counts, over all processes.
        shared_prefills: prefills that served several requests.
        processes: how many evaluated.
    """
    by_kind = account.by("kind")
    found = setup.fasa.profile  # with profile=prompt it exists once a long prompt was read
    return {
        **setup.parameters(),
        **({} if setup.calibration.profile is not None or found is None else {"profile": found.fingerprint}),
        "stays_dense": {str(layer): reason for layer, reason in setup.fasa.dense_layers.items()},
        "calibration": setup.calibration.record,
        "tasks": {task: run.as_dict() for task, run in account.by("task").items()},
        "requests": {kind: run.as_dict() for kind, run in by_kind.items()},
        "truncated_inputs": sum(run.truncated for run in by_kind.values()),
        "warnings": account.warnings(),
        "shared_prefills": shared_prefills,
        "processes": processes,
        "versions": {name: version_of(name) for name in ("fasa-flex", "lm-eval", "torch", "transformers")},
    }
