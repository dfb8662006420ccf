"""A model's profile: tables of its chunks from one calibration, saved to and loaded from a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel

from fasa_flex.calibration.chunk_tables import ChunkTables
from fasa_flex.calibration.json_fields import field
from fasa_flex.calibration.provenance import Provenance, known_hashes
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.config import FasaConfig
from fasa_flex.errors import ArgumentTypeError
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.hf.wrappers import unwrapped
from fasa_flex.saving import replacing, settled

FORMAT = 2
"""Format of saved profiles; 1 has the table of agreement only."""

_JSON = constants.CONFIG_NAME
_TENSORS = "agreement.safetensors"
_CARD = "README.md"
_MOST_BYTES = {_JSON: 1 << 26, _TENSORS: 1 << 30}


class FasaProfile(
    ChunkTables,
    ModelHubMixin,
    library_name="fasa_flex",
    tags=["fasa", "sparse-attention"],
    paper_url="https://arxiv.org/abs/2602.03152",
):
    """The result of calibrating one model, saved as safetensors and JSON, without code.

    `ChunkTables` describes the tables and how dominant chunks are chosen from them.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> FasaProfile:
        """Skip `ModelHubMixin.__new__`, which would save the arguments as a second config.json."""
        return object.__new__(cls)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tables, layout and provenance, which names this profile in results."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def check_fits(self, model: PreTrainedModel) -> None:
        """Refuse a model whose queries and keys this profile does not describe.

        Raises:
            ValueError: another shape, model type or rotary configuration; the message has the first difference.
        """
        model = unwrapped(model)
        layers, query_heads, kv_heads, head_dim = attention_shape(model)
        hashes = known_hashes(model)
        rotary = self.provenance.config_hash if self.provenance.config_hash in hashes else hashes[0]
        in_model = {
            "model type": model.config.get_text_config().model_type,
            "layers": layers,
            "query heads": query_heads,
            "key/value heads": kv_heads,
            "head dimensions": head_dim,
            "rotary configuration": rotary[:12],
        }
        in_profile = {
            "model type": self.provenance.model_type,
            "layers": self.agreement.shape[0],
            "query heads": self.agreement.shape[1],
            "key/value heads": self.provenance.kv_heads,
            "head dimensions": self.layout.head_dim,
            "rotary configuration": self.provenance.config_hash[:12],
        }
        for name, value in in_profile.items():
            if value != in_model[name]:
                raise ValueError(
                    f"the profile of {self.provenance.model_id} does not fit this model: {name} {value} in the profile "
                    f"and {in_model[name]} in the model; calibrate this model."
                )

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write the profile into its own folder, and push it if asked (as `huggingface_hub` documents).

        An existing profile is replaced as a whole; if saving fails or is killed, it stays.

        Raises:
            ValueError: the folder cannot be written to, or holds a ``config.json`` that is no profile.
        """
        folder = Path(save_directory)
        check_place(folder)
        with replacing(folder) as beside:
            super().save_pretrained(beside, model_card_kwargs=kwargs.get("model_card_kwargs"))
            if (folder / _CARD).exists():  # may be the user's
                (beside / _CARD).unlink()
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(repo_id=repo_id or folder.name, **kwargs)
        return url

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FasaProfile:
        """Load a profile from a folder or a Hub repository; arguments as `huggingface_hub.ModelHubMixin` documents.

        Raises:
            TypeError: an unknown argument.
            ValueError: no profile there, or a damaged or altered one.
        """
        _check_size(Path(pretrained_model_name_or_path))
        try:
            profile: FasaProfile = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            exists = Path(pretrained_model_name_or_path).is_dir()
            reason = "cannot be read" if exists else "is no folder, and the Hub gives no such profile"
            raise ValueError(
                f"{pretrained_model_name_or_path} {reason} ({type(error).__name__}); "
                "pass a folder that save_pretrained wrote."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(pretrained_model_name_or_path, f"{_JSON} is no JSON") from error
        except AttributeError as error:
            raise _damaged(pretrained_model_name_or_path, f"{_JSON} is no table of names") from error
        return profile

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / _TENSORS).write_bytes(self._tensors())
        (save_directory / _JSON).write_text(self._json())

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **kwargs: Any,
    ) -> FasaProfile:
        if kwargs:
            raise ArgumentTypeError(f"unknown arguments {sorted(kwargs)}; a profile loads without options.")
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[_JSON, _TENSORS],
                )
            )
        return cls._load(folder)

    @classmethod
    def _load(cls, folder: Path) -> FasaProfile:
        with settled(folder):
            for name in (_JSON, _TENSORS):
                if not (folder / name).is_file():
                    raise ValueError(
                        f"{folder} holds no FASA profile: {name} is missing; pass a folder that save_pretrained wrote."
                    )
            _check_size(folder)
            data = (folder / _TENSORS).read_bytes()
            description = (folder / _JSON).read_bytes()
        try:
            fields = field(json.loads(description), "fasa_profile", dict)
            later = field(fields, "format", int) > FORMAT
            profile = None if later else cls._of(fields, data)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise _damaged(folder, str(error)) from error
        if profile is None:
            raise ValueError(f"the profile in {folder} has format {fields['format']}; upgrade fasa_flex to read it.")
        return profile

    @classmethod
    def _of(cls, fields: dict[str, Any], data: bytes) -> FasaProfile:
        if fields["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"format {fields['format']!r} is none of 1 to {FORMAT}")
        if hashlib.sha256(data).hexdigest() != field(fields, "tensors_sha256", str):
            raise ValueError(f"{_TENSORS} is not the file that {_JSON} describes")
        layout = RotaryLayout.from_dict(field(fields, "layout", dict))
        provenance = Provenance.from_dict(field(fields, "provenance", dict))
        profile = cls(layout=layout, provenance=provenance, **load(data))
        layers = len(profile.agreement)
        for kind, named in (("without RoPE", layout.unrotated_layers), ("not served", layout.unserved_layers)):
            if not layers or not set(named) <= set(range(layers)):
                raise ValueError(f"layers {kind} {named} are none of {layers} layers")
        return profile

    def _tensors(self) -> bytes:
        data: bytes = save(self.tables())
        return data

    def _json(self) -> str:
        fields = {
            "format": FORMAT if len(self.tables()) > 1 else 1,
            "tensors_sha256": hashlib.sha256(self._tensors()).hexdigest(),
            "layout": self.layout.to_dict(),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return json.dumps({"fasa_profile": fields}, indent=2, sort_keys=True)

    def __repr__(self) -> str:
        layers, heads, chunks = self.agreement.shape
        return f"FasaProfile({self.provenance.model_id}: {layers} layers, {heads} query heads, {chunks} chunks)"


def _check_size(folder: Path) -> None:
    """Refuse files larger than any profile, before they are read."""
    for name, most in _MOST_BYTES.items():
        file = folder / name
        if file.is_file() and file.stat().st_size > most:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, a profile's file at most {most}; "
                "pass a folder that save_pretrained wrote."
            )


def check_place(folder: Path) -> None:
    """Refuse a folder whose ``config.json`` is no profile's and would be overwritten.

    Raises:
        ValueError: with the file.
    """
    existing = folder / _JSON
    if existing.exists() and '"fasa_profile"' not in existing.read_text(errors="replace"):
        raise ValueError(
            f"{existing} belongs to something else, a model perhaps; save the profile to a folder of its own."
        )


def check_kinds(profile: object, config: object) -> None:
    """Check the types of a profile, which may be None, and a config.

    Raises:
        TypeError: another type.
    """
    if profile is not None and not isinstance(profile, FasaProfile):
        sentence = f"profile must be a FasaProfile, got {profile!r}; read one with FasaProfile.from_pretrained."
        raise ArgumentTypeError(sentence)
    if not isinstance(config, FasaConfig):
        raise ArgumentTypeError(f"config must be a FasaConfig, got {config!r}; make one with FasaConfig(n_fac=...).")


def _damaged(folder: str | Path, reason: str) -> ValueError:
    return ValueError(f"the profile in {folder} is damaged or altered ({reason.removesuffix('.')}); save it again.")
