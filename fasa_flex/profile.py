"""The agreement table with its provenance: what calibration finds once per model, and where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.budget import check_count
from fasa_flex.config import Sharing, check_choice
from fasa_flex.layers import attention_shape
from fasa_flex.rotary import RotaryLayout
from fasa_flex.saving import replacing, settled

FORMAT = 1
_JSON = constants.CONFIG_NAME
_TENSORS = "agreement.safetensors"
_CARD = "README.md"
_MOST_BYTES = 1 << 26
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
        max_new_tokens: decode steps a sample contributed at most.
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


class FasaProfile(
    ModelHubMixin,
    library_name="fasa_flex",
    tags=["fasa", "sparse-attention"],
    paper_url="https://arxiv.org/abs/2602.03152",
):
    """Agreement of every chunk with its head, for one model; saved as safetensors and JSON, no code.

    Attributes:
        agreement: float32 [layers, query heads, chunks], mean contextual agreement in [0, 1].
        layout: the chunks the last dimension counts.
        provenance: model, samples and settings of the calibration.
    """

    def __init__(self, agreement: Tensor, layout: RotaryLayout, provenance: Provenance) -> None:
        agreement = agreement.detach().float().cpu().contiguous()
        if agreement.dim() != 3 or agreement.shape[2] != len(layout.chunks):
            raise ValueError(
                f"agreement must be [layers, query heads, {len(layout.chunks)} chunks], got {tuple(agreement.shape)}."
            )
        if not ((agreement >= 0) & (agreement <= 1)).all():
            raise ValueError("agreement must lie in [0, 1]; calibrate again.")
        for name in ("kv_heads", "top_k", "queries"):
            check_count(f"{name} of a profile", getattr(provenance, name), least=1)
        if agreement.shape[1] % provenance.kv_heads:
            raise ValueError(
                f"{agreement.shape[1]} query heads do not divide into {provenance.kv_heads} key/value heads; "
                "calibrate again."
            )
        self.agreement = agreement
        self.layout = layout
        self.provenance = provenance

    def __new__(cls, *args: Any, **kwargs: Any) -> FasaProfile:
        """Past the mixin's own, which would write the arguments out as a second config.json."""
        return object.__new__(cls)

    def dominant(self, n_tip: int, per: Sharing = "kv_head") -> Tensor:
        """The ``n_tip`` chunks of highest mean agreement (the paper's I_dom; ties to the lower chunk).

        Args:
            n_tip: chunks a head keeps.
            per: ``"kv_head"`` averages agreement over the query heads of each GQA group; ``"query_head"`` does not.

        Returns:
            int64 [layers, Hkv or Hq, n_tip], chunk numbers, ascending.
        """
        check_choice("per", per, Sharing)
        layers, _, chunks = self.agreement.shape
        if not 1 <= n_tip <= chunks:
            raise ValueError(f"n_tip must lie in 1..{chunks}, the chunks of a head, got {n_tip}.")
        table = self._counts()
        if per == "kv_head":
            table = table.view(layers, self.provenance.kv_heads, -1, chunks).mean(2)
        best = torch.argsort(table, dim=-1, descending=True, stable=True)[..., :n_tip]
        return best.sort(dim=-1).values

    def dominant_dims(self, n_tip: int, per: Sharing = "kv_head") -> Tensor:
        """`dominant` as dimension pairs: int64 [layers, Hkv or Hq, n_tip, 2]."""
        return self.layout.chunks[self.dominant(n_tip, per)]

    def _counts(self) -> Tensor:
        """Agreement as the counts it was made from, where it was, so that equal ones tie exactly: float64."""
        counts = self.agreement.double() * self.provenance.queries * self.provenance.top_k
        whole = counts.round()
        rounding = max(0.1, float(counts.max()) * torch.finfo(torch.float32).eps)  # beyond 0.5, a count is not known
        return whole if (counts - whole).abs().max() < min(rounding, 0.5) else counts

    @property
    def fingerprint(self) -> str:
        """SHA-256 over table, layout and provenance: names this profile in results."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def check_fits(self, model: PreTrainedModel) -> None:
        """Refuse a model whose queries and keys this profile does not describe.

        Raises:
            ValueError: another shape, model type or rotary configuration; the sentence names the first difference.
        """
        layers, query_heads, kv_heads, head_dim = attention_shape(model)
        theirs = {
            "model type": model.config.get_text_config().model_type,
            "layers": layers,
            "query heads": query_heads,
            "key/value heads": kv_heads,
            "head dimensions": head_dim,
            "rotary configuration": config_hash(model)[:12],
        }
        ours = {
            "model type": self.provenance.model_type,
            "layers": self.agreement.shape[0],
            "query heads": self.agreement.shape[1],
            "key/value heads": self.provenance.kv_heads,
            "head dimensions": self.layout.head_dim,
            "rotary configuration": self.provenance.config_hash[:12],
        }
        for name, value in ours.items():
            if value != theirs[name]:
                raise ValueError(
                    f"the profile of {self.provenance.model_id} does not fit this model: {name} {value} in the profile "
                    f"and {theirs[name]} in the model; calibrate this model."
                )

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write the profile into a folder of its own (and push it, as `huggingface_hub` documents).

        A profile that is there already is replaced as a whole, or, if this is killed or fails, not at all.

        Raises:
            ValueError: the folder holds another thing's ``config.json``, which would be lost, or cannot be written to.
        """
        folder = Path(save_directory)
        existing = folder / _JSON
        if existing.exists() and '"fasa_profile"' not in existing.read_text(errors="replace"):
            raise ValueError(
                f"{existing} belongs to something else, a model perhaps; save the profile to a folder of its own."
            )
        with replacing(folder) as beside:
            super().save_pretrained(beside, model_card_kwargs=kwargs.get("model_card_kwargs"))
            if (folder / _CARD).exists():  # a user's own, perhaps
                (beside / _CARD).unlink()
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(repo_id=repo_id or folder.name, **kwargs)
        return url

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FasaProfile:
        """Read a profile from a folder or a Hub repository; arguments as `huggingface_hub.ModelHubMixin` documents.

        Raises:
            ValueError: no profile there, or a damaged or altered one.
        """
        _check_size(Path(pretrained_model_name_or_path))
        try:
            profile: FasaProfile = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            there = Path(pretrained_model_name_or_path).is_dir()
            reason = "cannot be read" if there else "is no folder, and the Hub gives no such profile"
            raise ValueError(
                f"{pretrained_model_name_or_path} {reason} ({type(error).__name__}); "
                "pass a folder that save_pretrained wrote."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
            raise _damaged(pretrained_model_name_or_path, error) from error
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
            raise ValueError(f"unknown arguments {sorted(kwargs)}; a profile loads without options.")
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
            fields = json.loads(description)["fasa_profile"]
            later = isinstance(fields["format"], int) and fields["format"] > FORMAT
            profile = None if later else cls._of(fields, data)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise _damaged(folder, error) from error
        if profile is None:
            raise ValueError(f"the profile in {folder} has format {fields['format']}; upgrade fasa_flex to read it.")
        return profile

    @classmethod
    def _of(cls, fields: dict[str, Any], data: bytes) -> FasaProfile:
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r} is not {FORMAT}")
        if hashlib.sha256(data).hexdigest() != fields["tensors_sha256"]:
            raise ValueError(f"{_TENSORS} is not the file that {_JSON} describes")
        provenance = fields["provenance"]
        provenance["sample_hashes"] = tuple(provenance["sample_hashes"])
        provenance["versions"] = {str(name): str(version) for name, version in provenance["versions"].items()}
        return cls(load(data)["agreement"], RotaryLayout.from_dict(fields["layout"]), Provenance(**provenance))

    def _tensors(self) -> bytes:
        data: bytes = save({"agreement": self.agreement})
        return data

    def _json(self) -> str:
        fields = {
            "format": FORMAT,
            "tensors_sha256": hashlib.sha256(self._tensors()).hexdigest(),
            "layout": self.layout.to_dict(),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return json.dumps({"fasa_profile": fields}, indent=2, sort_keys=True)

    def __repr__(self) -> str:
        layers, heads, chunks = self.agreement.shape
        return f"FasaProfile({self.provenance.model_id}: {layers} layers, {heads} query heads, {chunks} chunks)"


def _check_size(folder: Path) -> None:
    """Refuse files that no profile is as large as, before they are read."""
    for name in (_JSON, _TENSORS):
        file = folder / name
        if file.is_file() and file.stat().st_size > _MOST_BYTES:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, a profile's files at most {_MOST_BYTES}; "
                "pass a folder that save_pretrained wrote."
            )


def _damaged(folder: str | Path, error: Exception) -> ValueError:
    return ValueError(f"the profile in {folder} is damaged or altered ({error}); save it again.")


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the config fields that decide what queries and keys look like, stable over transformers versions."""
    config = model.config.get_text_config()
    fields = {name: getattr(config, name, None) for name in _ROPE_FIELDS}
    described = {
        "model_type": config.model_type,
        "shape": attention_shape(model),
        "hidden_size": config.hidden_size,
        **fields,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
