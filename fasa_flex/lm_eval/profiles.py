"""Calibration before the tasks; the profile of ``profile=auto`` is cached on disk for later runs.

The cache key is a hash of the model's weights, the calibration text and the profile format, so that profiles of an
older format, which hold less, are not found. Global random state is restored afterwards: tasks that draw from it, as
RULER's do, would otherwise ask other questions than without calibration.
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
from fasa_flex.hf.head_shard import HeadShard, whole_parameter
from fasa_flex.lm_eval.haystack import document
from fasa_flex.saving import check_writable

AUTO = "auto"
PROMPT = "prompt"
FACTS = "facts"
_VALUES = 64  # values of each parameter that are hashed


@dataclass(frozen=True)
class Source:
    """The text that a profile is calibrated on.

    Attributes:
        name: ``facts``, documents with facts in the packaged text, which end on a question as in the packaged tasks
            (with other facts); or the path of a text file, whose beginning is taken.
        length: tokens of a sample.
        samples: number of samples.
        steps: decode steps of each sample; for ``facts`` those of the answer.
        top_k: K of contextual agreement.
        sha256: SHA-256 of the samples' text.
    """

    name: str
    length: int
    samples: int
    steps: int
    top_k: int
    sha256: str


def default_cache() -> Path:
    """The folder of calibrated profiles: ``$XDG_CACHE_HOME/fasa_flex/profiles``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fasa_flex" / "profiles"


@dataclass(frozen=True)
class Calibration:
    """A method's calibration to one model.

    Attributes:
        profile: for FASA, random chunks and adjacent pairs.
        channels: for double sparsity, channel weights, float32 [layers, Hkv, D].
        record: the fields of `Source`, and ``cached``; ``{"name": "prompt"}`` if the first long prompt will calibrate
            the model; None if the user passed the profile.
    """

    profile: FasaProfile | None
    channels: Tensor | None = None
    record: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the channels or the profile, for results."""
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
    """The profile that the user passed, or one calibrated on ``source``.

    ``adjacent_pairs`` needs a profile of adjacent pairs and ``double_sparsity`` needs channel weights; both are
    calibrated if the profile is another one.

    Args:
        method: a method of `FasaHFLM`.
        profile: ``auto``, ``prompt`` (FASA only), a profile, its folder or repository, or None.
        model: under dense attention.
        tokenizer: the model's.
        source: the name of a `Source`.
        max_length: the model's maximum, in tokens; samples are shorter.
        cache: folder of profiles.

    Raises:
        ValueError: a source that is neither ``facts`` nor a text file or is too short, or ``prompt`` for a baseline.
    """
    if method == "double_sparsity":
        return auto_channels(model, tokenizer, source, max_length)
    if profile == PROMPT:
        if method != "fasa":
            raise ValueError(f"profile=prompt serves method=fasa alone, got method={method}; pass auto or a folder.")
        return Calibration(None, record={"name": PROMPT})
    if isinstance(profile, str) and profile != AUTO:
        profile = FasaProfile.from_pretrained(profile)
    adjacent = method == "adjacent_pairs"
    if isinstance(profile, FasaProfile):
        if not adjacent or profile.layout == adjacent_pairs(profile.layout):
            return Calibration(profile)
    elif profile is None and not adjacent:
        return Calibration(None)
    calibrated, record = auto_profile(model, tokenizer, source, max_length, cache, adjacent=adjacent)
    return Calibration(calibrated, record=record)


def auto_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_length: int,
    cache: Path,
    *,
    adjacent: bool = False,
) -> tuple[FasaProfile, dict[str, Any]]:
    """The model's profile, calibrated on ``source`` or found in ``cache``, and `Calibration.record`.

    Args:
        model: under dense attention.
        tokenizer: the model's.
        source: the name of a `Source`.
        max_length: the model's maximum, in tokens; samples are shorter.
        cache: folder of profiles.
        adjacent: calibrate adjacent pairs of dimensions instead of the model's planes.

    Raises:
        ValueError: a source that is neither ``facts`` nor a text file, or is too short.
    """
    with preserved_rng():
        texts, described = samples_of(source, lambda text: len(tokenizer(text).input_ids), max_length)
        decides = (model_hash(model), described, FORMAT, *(("adjacent pairs",) if adjacent else ()))
        folder = cache / hashlib.sha256(repr(decides).encode()).hexdigest()[:32]
        shard = HeadShard.of(model)
        if shard.agree((folder / CONFIG_NAME).is_file()):
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
        if shard.rank == 0:
            profile.save_pretrained(folder)
        return profile, {**asdict(described), "cached": False}


def auto_channels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, max_length: int
) -> Calibration:
    """Channel weights from the same texts as `auto_profile`; not cached, since they cost one forward for each text."""
    texts, described = samples_of(source, lambda text: len(tokenizer(text).input_ids), max_length)
    weights = channel_weights(model, _encoded(texts, tokenizer, described))
    return Calibration(None, weights, {**asdict(described), "cached": False})


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, described: Source) -> list[Tensor]:
    return [torch.tensor(tokenizer(text).input_ids)[: described.length] for text in texts]


def samples_of(source: str, count_tokens: Callable[[str], int], max_length: int) -> tuple[list[str], Source]:
    """The texts to calibrate on, and their description.

    Args:
        source: ``facts``, or the path of a text file.
        count_tokens: number of tokens of a text.
        max_length: the model's maximum, in tokens.

    Raises:
        ValueError: no such file, no UTF-8, or fewer than 64 tokens.
    """
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
                f"calibration_source={source!r} is neither {FACTS!r} nor a text file; pass the path of a long text."
            )
        steps = 64
        try:
            texts = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"calibration_source={source!r} is no text in UTF-8 ({error}); pass one.") from error
        length = least = min(count_tokens(texts[0]), 8192, max_length - steps)
        if least < 64:
            raise ValueError(
                f"calibration_source={source!r} has {least} tokens, calibration needs at least 64; pass a longer text."
            )
    sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return texts, Source(source, length, len(texts), steps, min(256, least // 4), sha256)


def model_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the rotary configuration and of every parameter's name, shape, dtype and 64 of its values."""
    digest = hashlib.sha256(config_hash(model).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = whole_parameter(parameter).detach().flatten()
        at = torch.linspace(0, max(0, len(flat) - 1), min(_VALUES, len(flat)), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the state of Python's, NumPy's and torch's global generators when the block ends."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
