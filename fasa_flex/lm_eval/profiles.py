"""What methods are calibrated to before the tasks: ``profile=auto`` once, to find its profile again the next time.

The profile is kept by what decides it: a hash of the model's weights, the source that was calibrated on, and the format
of profiles, so that one of an older version is not found, which holds less. Global random state is the same before and
after, since a task that draws from it (RULER's do) would otherwise ask other questions than it asks a model without
calibration.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import CONFIG_NAME
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex import FasaProfile, RotaryLayout, calibrate
from fasa_flex.baselines import adjacent_pairs, channel_weights
from fasa_flex.calibration.profile import FORMAT
from fasa_flex.calibration.provenance import config_hash
from fasa_flex.lm_eval.haystack import document
from fasa_flex.saving import check_writable

AUTO = "auto"
PROMPT = "prompt"
FACTS = "facts"
_VALUES = 64  # of each parameter, for the hash


@dataclass(frozen=True)
class Source:
    """What to calibrate on.

    Attributes:
        name: ``facts``: documents with facts in the packaged text, which end on a question, as the packaged tasks ask
            them (other facts, the same kind of text); or the path of a text file, whose beginning is taken.
        length: tokens of a sample.
        samples: how many.
        steps: decode steps that each sample contributes: those that answer.
        top_k: K of contextual agreement.
        sha256: of the samples' text.
    """

    name: str
    length: int
    samples: int
    steps: int
    top_k: int
    sha256: str


def default_cache() -> Path:
    """Where calibrated profiles are kept: ``$XDG_CACHE_HOME/fasa_flex/profiles``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fasa_flex" / "profiles"


@dataclass(frozen=True)
class Calibration:
    """What a method knows of the model.

    Attributes:
        profile: of FASA, random chunks or adjacent pairs.
        channels: of double sparsity, float32 [layers, Hkv, D].
        record: the `Source` it was made from, and whether it was found in the cache; ``{"name": "prompt"}`` where the
            model will calibrate itself; None: it was given.
    """

    profile: FasaProfile | None
    channels: Tensor | None = None
    record: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 that names it in results."""
        if self.channels is not None:
            return hashlib.sha256(self.channels.numpy().tobytes()).hexdigest()
        return self.profile.fingerprint if self.profile else None


def calibration_for(
    method: str,
    profile: str | FasaProfile | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_length: int,
    cache: Path,
) -> Calibration:
    """The profile as it is given, or what the method needs besides, calibrated on ``source``.

    ``adjacent_pairs`` takes no profile but one of its own kind, and ``double_sparsity`` none: they are calibrated.

    Args:
        method: as `FasaHFLM` knows it.
        profile: ``auto``, ``prompt`` (of FASA alone), a profile, its folder or repository, or None.
        model: under dense attention.
        tokenizer: the model's.
        source: see `Source`.
        max_length: the model's maximum, which samples stay below.
        cache: folder of profiles.

    Raises:
        ValueError: a source that is neither ``facts`` nor a text file, or is too short.
    """
    if method == "double_sparsity":
        return auto_channels(model, tokenizer, source, max_length)
    if profile == PROMPT:
        if method != "fasa":
            raise ValueError(f"profile=prompt is FASA's own way, not that of method={method}: pass auto or a folder")
        return Calibration(None, record={"name": PROMPT})
    if isinstance(profile, str) and profile != AUTO:
        profile = FasaProfile.from_pretrained(profile)
    adjacent = method == "adjacent_pairs"
    if isinstance(profile, FasaProfile):
        if not adjacent or profile.layout == adjacent_pairs(profile.layout):
            return Calibration(profile)
    elif profile is None and not adjacent:
        return Calibration(None)
    made, record = auto_profile(model, tokenizer, source, max_length, cache, adjacent=adjacent)
    return Calibration(made, record=record)


def auto_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_length: int,
    cache: Path,
    *,
    adjacent: bool = False,
) -> tuple[FasaProfile, dict[str, Any]]:
    """The model's profile, calibrated on ``source`` or found in ``cache``, and a record of where it comes from.

    Args:
        model: under dense attention.
        tokenizer: the model's.
        source: see `Source`.
        max_length: the model's maximum, which samples stay below.
        cache: folder of profiles.
        adjacent: whether of adjacent pairs of dimensions instead of the model's planes.

    Raises:
        ValueError: a source that is neither ``facts`` nor a text file, or is too short.
    """
    with preserved_rng():
        texts, described = samples_of(source, lambda text: len(tokenizer(text).input_ids), max_length)
        decides = (model_hash(model), described, FORMAT, *(("adjacent pairs",) if adjacent else ()))
        folder = cache / hashlib.sha256(repr(decides).encode()).hexdigest()[:32]
        if (folder / CONFIG_NAME).is_file():
            profile = FasaProfile.from_pretrained(folder)
            profile.check_fits(model)
            return profile, {**asdict(described), "cached": True}
        check_writable(cache)
        profile = calibrate(
            model,
            _encoded(texts, tokenizer, described),
            top_k=described.top_k,
            max_new_tokens=described.steps,
            layout=adjacent_pairs(RotaryLayout.detect(model)) if adjacent else None,
            progress=False,
        )
        profile.save_pretrained(folder)
        return profile, {**asdict(described), "cached": False}


def auto_channels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, max_length: int
) -> Calibration:
    """Channel weights from the texts that `auto_profile` takes; they cost a forward for each and are not kept."""
    texts, described = samples_of(source, lambda text: len(tokenizer(text).input_ids), max_length)
    weights = channel_weights(model, _encoded(texts, tokenizer, described))
    return Calibration(None, weights, {**asdict(described), "cached": False})


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, described: Source) -> list[Tensor]:
    return [torch.tensor(tokenizer(text).input_ids)[: described.length] for text in texts]


def samples_of(source: str, count_tokens: Callable[[str], int], max_length: int) -> tuple[list[str], Source]:
    """The texts to calibrate on."""
    if source == FACTS:
        steps = 8
        length = min(2048, max_length - steps)
        texts = [
            document(random.Random(f"calibration/{number}"), length=length, count_tokens=count_tokens, n_facts=8).prompt
            for number in range(4)
        ]
        length = max(count_tokens(text) for text in texts)
        least = min(count_tokens(text) for text in texts)
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(
                f"calibration_source={source!r} is neither {FACTS!r} nor a text file: pass the path of a long text"
            )
        steps = 64
        try:
            texts = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"calibration_source={source!r} is no text in UTF-8 ({error}): pass one") from error
        length = least = min(count_tokens(texts[0]), 8192, max_length - steps)
        if least < 64:
            raise ValueError(
                f"calibration_source={source!r} gives {least} tokens, calibration needs at least 64: pass a longer text"
            )
    sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return texts, Source(source, length, len(texts), steps, min(256, least // 4), sha256)


def model_hash(model: PreTrainedModel) -> str:
    """SHA-256 over the rotary configuration and every parameter's name, shape, type and 64 of its values."""
    digest = hashlib.sha256(config_hash(model).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        at = torch.linspace(0, max(0, len(flat) - 1), min(_VALUES, len(flat)), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Give Python's, NumPy's and torch's global generators back the state they had."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
