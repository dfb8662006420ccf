"""One class through the matrix: `enable`, budgets, `disable` and every way of generating, classified in a record."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import ways
from generation import profile_of
from sentences import assert_sentence
from sweep.build import NotBuiltError, build
from transformers import PreTrainedModel
from ways import BUFFER, PROMPT, WAYS, Result, Way, generate, prompts

from fasa_flex import FasaConfig, FasaProfile, enable
from fasa_flex.hf.model_structure import attention_modules
from fasa_flex.model.handle import Fasa

SELF_CALIBRATED = Way("without a profile", lambda model: generate(model, prompts(60, rows=1).repeat(1, 3)))


@dataclass
class Record:
    """What the sweep knows of a class.

    Attributes:
        name: the class.
        family: its ``model_type``.
        status: "works", "dense" (no layer is sparse), "refused", "raw" (an error that is no sentence, or other results
            than the matrix asks for) or "not built".
        reason: of any status but "works".
        layers: number of layers.
        sparse: layers that are sparse.
        dense: layers that stay dense, each with the reason.
        kinds: kinds of layers that the config names.
        ways: by name of the way of generating: "yes", "dense", or why the dense model cannot.
        seconds: time of the whole examination.
    """

    name: str
    family: str = ""
    status: str = ""
    reason: str = ""
    layers: int = 0
    sparse: list[int] = field(default_factory=list)
    dense: dict[int, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class Raw(Exception):
    """The class breaks a promise; the message says which."""


class Refused(Exception):
    """The library refuses the class in one sentence."""


BACKENDS = ("gather", "reference")
QUICK = ("greedy",)
"""Ways of a quick run, beside the one without a profile."""

WHOLE = ("greedy", "left padding", "StaticCache")
"""Ways that also run at a full budget, and again after `disable`; the support matrix does so in every way."""

NEW = 3
"""Tokens of each run, two of them sparse: a third of the support matrix's time."""


def examine(name: str, quick: bool = False) -> dict[str, Any]:
    """The record of one class; never raises."""
    start, record = time.perf_counter(), Record(name)
    with warnings.catch_warnings(), mock.patch.object(ways, "NEW", NEW):
        warnings.simplefilter("ignore")
        try:
            _examine(record, quick)
        except NotBuiltError as error:
            record.status, record.reason = "not built", str(error)
        except Refused as error:
            record.status, record.reason = "refused", str(error)
        except Raw as error:
            record.status, record.reason = "raw", str(error)
        except Exception as error:  # a fault of the sweep, or of the model where it should have been caught
            record.status, record.reason = "raw", "unexpected " + said(error)
    record.seconds = round(time.perf_counter() - start, 1)
    return asdict(record)


def said(error: Exception) -> str:
    """An error in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{where}"


def _examine(record: Record, quick: bool) -> None:
    model = build(record.name)
    text = model.config.get_text_config()
    record.family = model.config.model_type
    record.kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    with unchanged(model):
        profile = _profile(model)
    with unchanged(model), asked():
        fasa = enable(model, profile, FasaConfig(n_fac=6, n_sink=1, dense_layers=()))
        record.layers = text.num_hidden_layers
        record.dense = dict(fasa.dense_layers)
        record.sparse = [layer for layer in attention_modules(model) if layer not in record.dense]
        fasa.disable()
    for way in (*WAYS.values(), SELF_CALIBRATED):
        if quick and way.name not in QUICK and way is not SELF_CALIBRATED:
            continue
        if profile is not None or way is SELF_CALIBRATED:
            record.ways[way.name] = _way(record, model, None if way is SELF_CALIBRATED else profile, way)
    able = [result for result in record.ways.values() if result in ("yes", "dense")]
    record.status = "works" if record.sparse else "dense"
    if not able:
        record.reason = next(iter(record.ways.values()), "")
        record.status = "no text"


@contextmanager
def asked() -> Iterator[None]:
    """Tell a refusal in one sentence from a raw error."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and "fasa_flex" in last.filename and (last.line or "").startswith("raise"):
            try:
                assert_sentence(str(error))
            except AssertionError:
                raise Raw("no sentence: " + said(error)) from error
            raise Refused(str(error)) from error
        raise Raw(said(error)) from error


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Check that a model is as before, whether or not an error is raised."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        if after != before:
            different = [name for name in before if before[name] != after[name]]
            raise Raw(f"changes {different} of the model")


def _state(model: PreTrainedModel) -> dict[str, Any]:
    modules = list(model.modules())
    configs = {id(c): c for c in (getattr(module, "config", None) for module in modules) if c is not None}
    return {
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules),
        "attributes": [len(vars(module)) for module in modules],
        "implementations": [getattr(c, "_attn_implementation_internal", None) for c in configs.values()],
        "training": [module.training for module in modules],
        "random state": torch.get_rng_state().tolist(),
        "parameters": [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()],
    }


def _profile(model: PreTrainedModel) -> FasaProfile | None:
    """A profile; None for a model that generates no text, which calibrates itself if at all."""
    try:
        with asked():
            return profile_of(model)
    except Refused as error:
        if "does not continue a text" in str(error) and "enable without a profile" in str(error):
            return None
        raise


def _way(record: Record, model: PreTrainedModel, profile: FasaProfile | None, way: Way) -> str:
    try:
        dense = way.run(model)
    except Exception as error:
        return said(error)
    if way.name in WHOLE:
        full, count = _sparse(model, profile, way, FasaConfig(n_fac=BUFFER * 4, dense_layers=()))
        if count:
            raise Raw(f"{way.name}: {count} sparse queries at a full budget")
        _compare(f"{way.name}, full budget against dense", full, dense, 1e-4)
    small = FasaConfig(n_fac=6, n_sink=1, dense_layers=())
    (got, count), (expected, _) = (_sparse(model, profile, way, replace(small, backend=each)) for each in BACKENDS)
    if record.sparse and not count and not _caches(model):
        return "the model decodes without a cache"
    if bool(count) != bool(record.sparse):
        raise Raw(f"{way.name}: {count} sparse queries, sparse layers {record.sparse}")
    _compare(f"{way.name}, small budget against the reference", got, expected, 1e-3)
    if way.name in WHOLE:
        after = way.run(model)
        if not (torch.equal(after[0], dense[0]) and torch.equal(after[1], dense[1])):
            again = way.run(model)
            if not (torch.equal(after[0], again[0]) and torch.equal(after[1], again[1])):
                return "the dense model itself gives other results the second time"
            raise Raw(f"{way.name}: after disable() the model is not what it was")
    return "yes" if record.sparse else "dense"


def _caches(model: PreTrainedModel) -> bool:
    """Whether a model's generation keeps keys."""
    out = model.generate(prompts(rows=1), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    return getattr(out, "past_key_values", None) is not None or getattr(out, "cache", None) is not None


def _sparse(model: PreTrainedModel, profile: FasaProfile | None, way: Way, config: FasaConfig) -> tuple[Result, int]:
    try:
        with enable(model, profile, config) as fasa, _boundary(fasa, way):
            return way.run(model), fasa.stats.sparse_queries
    except Exception as error:
        raise Raw(f"{way.name}: {said(error)}") from error


def _boundary(fasa: Fasa, way: Way) -> Any:
    return fasa.sparse_from(torch.tensor([PROMPT])) if way.boundary else nullcontext()


def _compare(what: str, got: Result, expected: Result, tolerance: float) -> None:
    if got[0].shape != expected[0].shape or got[1].shape != expected[1].shape:
        raise Raw(f"{what}: shapes {tuple(got[1].shape)} and {tuple(expected[1].shape)}")
    limit = tolerance * max(1.0, float(expected[1][expected[1].isfinite()].abs().max()))
    finite = got[1].isfinite(), expected[1].isfinite()
    both = finite[0] & finite[1]
    distance = float((got[1] - expected[1])[both].abs().max()) if both.any() else 0.0
    same = torch.equal(got[0], expected[0])
    if not same or distance > limit or not torch.equal(*finite):
        raise Raw(f"{what}: logits differ by {distance:.2g}, tokens {'are the same' if same else 'differ'}")
