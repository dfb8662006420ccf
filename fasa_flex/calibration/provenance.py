"""Where a profile came from, and which models have the queries and keys that it describes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from fasa_flex.calibration.json_fields import check_names, field
from fasa_flex.core.budget import check_count
from fasa_flex.hf.model_structure import attention_shape

_ROPE_FIELDS = ("rope_parameters", "partial_rotary_factor", "qk_norm", "use_qk_norm", "sliding_window", "layer_types")


@dataclass(frozen=True)
class Provenance:
    """Where a profile came from.

    Attributes:
        model_id: name or folder the model was loaded from.
        model_type: transformers' ``model_type``.
        config_hash: SHA-256 of the config fields that decide queries and keys (`config_hash`).
        kv_heads: key/value heads of the model.
        top_k: K of contextual agreement.
        max_new_tokens: decode steps a sample contributed at most; 0: its prompt alone was measured.
        queries: decode queries averaged, over all samples.
        sample_hashes: SHA-256 of each sample's token ids.
        versions: of fasa_flex, torch and transformers.
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
    def from_dict(cls, fields: dict[str, Any]) -> Provenance:
        """The inverse of `dataclasses.asdict`, through JSON.

        Raises:
            ValueError: a field that is missing, of another type or unknown.
        """
        check_names("provenance", fields, {known.name for known in dataclasses.fields(cls)})
        for name in ("model_id", "model_type", "config_hash"):
            field(fields, name, str)
        for name in ("kv_heads", "top_k", "queries", "max_new_tokens"):
            check_count(name, field(fields, name, int), 0 if name == "max_new_tokens" else 1)
        hashes = tuple(map(str, field(fields, "sample_hashes", list)))
        versions = {name: str(version) for name, version in field(fields, "versions", dict).items()}
        return cls(**{**fields, "sample_hashes": hashes, "versions": versions})


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the config fields that decide what queries and keys look like, stable over transformers versions.

    Of rotary numbers it takes the value alone: a GGUF file says 100000.0 where config.json says 100000.
    """
    return _hash(model, _as_floats)


def known_hashes(model: PreTrainedModel) -> tuple[str, ...]:
    """`config_hash`, and what the first version made, which told 100000 from 100000.0: its profiles fit on."""
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
    """Every whole number in it as a float."""
    if isinstance(value, dict):
        return {name: _as_floats(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(own) for own in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
