"""Origin of a profile, and the hash that decides whether it fits a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import PreTrainedModel

from fasa_flex.calibration.json_fields import check_names, field
from fasa_flex.core.budget import check_count
from fasa_flex.hf.model_structure import attention_shape

_ROPE_FIELDS = ("rope_parameters", "partial_rotary_factor", "qk_norm", "use_qk_norm", "sliding_window", "layer_types")


@dataclass(frozen=True)
class Provenance:
    """Model, samples and settings of a calibration.

    Attributes:
        model_id: name or folder from which the model was loaded.
        model_type: transformers' ``model_type``.
        config_hash: SHA-256 of the config fields that decide queries and keys (`config_hash`).
        kv_heads: key/value heads of the model.
        top_k: K of contextual agreement.
        max_new_tokens: most decode steps of a sample; 0 if queries of the prompt were measured.
        queries: number of measured queries, over all samples.
        sample_hashes: SHA-256 of each sample's token ids.
        versions: versions of fasa_flex, torch and transformers.
    """

    model_id: str
    model_type: str
    config_hash: str
    kv_heads: int
    top_k: int
    max_new_tokens: int
    queries: int
    sample_hashes: tuple[str, ...]
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        top_k: int,
        max_new_tokens: int,
        queries: int,
        sample_hashes: tuple[str, ...] = (),
    ) -> Provenance:
        """The provenance of a calibration of ``model`` by the installed packages."""
        return cls(
            model_id=model.config.name_or_path or type(model).__name__,
            model_type=model.config.get_text_config().model_type,
            config_hash=config_hash(model),
            kv_heads=attention_shape(model)[2],
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            queries=queries,
            sample_hashes=sample_hashes,
            versions={name: version_of(name) for name in ("fasa_flex", "torch", "transformers")},
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Provenance:
        """A provenance from JSON, as `dataclasses.asdict` makes it.

        Raises:
            ValueError: a field that is missing, unknown or of another type.
        """
        check_names("provenance", fields, {known.name for known in dataclasses.fields(cls)})
        for name in ("model_id", "model_type", "config_hash"):
            field(fields, name, str)
        for name in ("kv_heads", "top_k", "queries", "max_new_tokens"):
            check_count(name, field(fields, name, int), 0 if name == "max_new_tokens" else 1)
        hashes = tuple(map(str, field(fields, "sample_hashes", list)))
        versions = {name: str(version) for name, version in field(fields, "versions", dict).items()}
        return cls(**{**fields, "sample_hashes": hashes, "versions": versions})


def version_of(name: str, missing: str = "not installed") -> str:
    """The installed version of a package; ``missing`` if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return missing


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the config fields that decide queries and keys, the same under all transformers versions.

    Rotary numbers are hashed as floats: a GGUF file has 100000.0 where config.json has 100000.
    """
    return _hash(model, _as_floats)


def known_hashes(model: PreTrainedModel) -> tuple[str, ...]:
    """`config_hash`, and the hash of format 1, which distinguished 100000 from 100000.0; such profiles still fit."""
    return config_hash(model), _hash(model, lambda rotary: rotary)


def _hash(model: PreTrainedModel, rotary: Callable[[Any], Any]) -> str:
    config = model.config.get_text_config()
    fields = {name: getattr(config, name, None) for name in _ROPE_FIELDS}
    described = {
        "model_type": config.model_type,
        "shape": attention_shape(model),
        "hidden_size": config.hidden_size,
        **fields,
        "rope_parameters": rotary(fields["rope_parameters"]),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _as_floats(value: Any) -> Any:
    """The value with every int in it as a float."""
    if isinstance(value, dict):
        return {name: _as_floats(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(own) for own in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
