"""What results say under ``fasa``: everything that decides a sparse score, and what really was sparse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasa_flex.calibration.from_texts import version_of
from fasa_flex.hf.model_structure import attention_shape

if TYPE_CHECKING:
    from fasa_flex.lm_eval.model import FasaHFLM


def parameters_of(lm: FasaHFLM) -> dict[str, Any]:
    """All that decides a score, beside the model, JSON-ready."""
    return {
        "method": lm.method,
        **lm.fasa_config.to_dict(),
        **lm.fasa.settings,  # what the defaults come to here
        "n_tip": lm.fasa_config.chunks_of(attention_shape(lm.model)[3]),
        "profile": lm.calibration.fingerprint,
        "sparse_tail": lm.sparse_tail,
        "dense_prefix": lm.dense_prefix,
    }


def loaded_as(lm: FasaHFLM) -> dict[str, Any]:
    """All that decides an answer of the model itself, JSON-ready."""
    names = ["pretrained", "revision", "peft", "delta", "max_length", "truncation", "add_bos_token", "prefix_token_id"]
    names += ["gguf_file"] if lm.gguf_file is not None else []
    names += ["softmax_dtype", "mixed_precision_dtype", "enable_thinking", "chat_template_args", "on_truncation"]
    return {"dtype": str(lm.model.dtype), **{name: str(getattr(lm, name, None)) for name in names}}


def report_of(lm: FasaHFLM) -> dict[str, Any]:
    """Parameters, calibration, versions, and for each task what its queries were and read, JSON-ready."""
    by_kind = lm.account.by("kind")
    found = lm.fasa.profile  # with profile=prompt, what the first long prompt has led to
    return {
        **parameters_of(lm),
        **({} if lm.profile is not None or found is None else {"profile": found.fingerprint}),
        "stays_dense": {str(layer): reason for layer, reason in lm.fasa.dense_layers.items()},
        "calibration": lm.calibration.record,
        "tasks": {task: run.as_dict() for task, run in lm.account.by("task").items()},
        "requests": {kind: run.as_dict() for kind, run in by_kind.items()},
        "truncated_inputs": sum(run.truncated for run in by_kind.values()),
        "warnings": lm.account.warnings(),
        "shared_prefills": lm.passes.shared_prefills,
        "processes": lm.world_size,
        "versions": {name: version_of(name) for name in ("fasa-flex", "lm-eval", "torch", "transformers")},
    }
