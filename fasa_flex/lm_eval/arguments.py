"""Parsing of ``--model_args``: words of the command line become a `FasaConfig`, or an error of one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lm_eval.models.huggingface import HFLM

from fasa_flex import FasaConfig, FasaProfile
from fasa_flex.baselines import RANKING_OPTIONS, Method, as_published, scorer_factory, unheard
from fasa_flex.core.scoring import Scorer
from fasa_flex.errors import ArgumentTypeError
from fasa_flex.hf.compatibility import unmet
from fasa_flex.lm_eval.profiles import AUTO, Calibration

LayerSet = int | str | Sequence[int] | None


def layer_set(value: LayerSet) -> tuple[int, ...]:
    """Dense layers from ``0``, ``"0+1"`` or ``[0, 1]``; ``"none"`` or ``None`` is no layer.

    Layers are joined by a plus sign, since a comma ends an argument on lm-eval's command line.

    Raises:
        TypeError: another type.
        ValueError: another text.
    """
    if value is None or value == "none":
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str) and all(word.isdigit() for word in value.replace("+", " ").split()):
        return tuple(sorted({int(word) for word in value.replace("+", " ").split()}))
    if isinstance(value, list | tuple):
        return tuple(value)
    error = ValueError if isinstance(value, str) else ArgumentTypeError
    raise error(f"dense_layers={value!r} is not a set of layers; write 0, 0+1 or none.")


def budget_weights(value: str | Sequence[Any]) -> Any:
    """`FasaConfig.layer_budgets` from a name, from layer weights ``2+1+0.5`` or from head weights ``2:1+1:1+1:1``."""
    if not isinstance(value, str) or value in ("uniform", "pyramid"):
        return value
    try:
        heads = [[float(weight) for weight in layer.split(":")] for layer in value.replace("+", " ").split()]
    except ValueError:
        raise ValueError(
            f"layer_budgets={value!r} are no weights; write uniform, pyramid, or a number for every layer (2+1+0.5)."
        ) from None
    return tuple(tuple(layer) if len(layer) > 1 else layer[0] for layer in heads)


OPTIONS = tuple(field.name for field in dataclasses.fields(FasaConfig))
"""Every field of `FasaConfig` is an option of ``--model_args``."""

_PARSERS: dict[str, Callable[[Any], Any]] = {"layer_budgets": budget_weights, "dense_layers": layer_set}

_SYNONYMS = {"budget": ["n_fac"], "token_budget": ["n_fac"], "chunks": ["n_tip"], "n_chunks": ["n_tip"]}
"""Other projects' names for our options, for the hint of an error."""


def config_of(method: str, **options: Any) -> FasaConfig:
    """A `FasaConfig` from options of the command line.

    lm-eval turns the word ``none`` into None inside a string of arguments, and leaves it on the command line. Both mean
    the choice "none" or None where the option has one, and otherwise the default.

    Args:
        method: a method of `FasaHFLM`; a baseline's defaults are its paper's (`as_published`).
        options: values by name, of `OPTIONS`.

    Raises:
        ValueError: an option that the method does not use, or a value out of range.
    """
    if options.get("backend") == "fastest":
        raise ValueError("backend='fastest' falls back to dense attention, so scores would not be FASA's; write auto.")
    options = {name: None if value == "none" else value for name, value in options.items()}
    unused = unheard(method)
    for name in unused:
        if options.get(name) is not None:
            used = ", ".join(known for known in RANKING_OPTIONS if known not in unused) or "none of them"
            raise ValueError(
                f"method={method} does not use {name}={options[name]}; remove it (of {', '.join(RANKING_OPTIONS)} it "
                f"uses {used})."
            )
    hints = get_type_hints(FasaConfig)
    fields = {}
    for name, value in options.items():
        if name in _PARSERS:
            fields[name] = _PARSERS[name](value)
        elif value is not None:
            fields[name] = value
        elif "none" in _choices(hints[name]):
            fields[name] = "none"
        elif getattr(FasaConfig, name) is not None and type(None) in get_args(hints[name]):
            fields[name] = None  # packed_dtype=None is the cache's precision
    if method != "fasa":
        fields = {**as_published(method, fields.get("n_fac", FasaConfig.n_fac)), **fields}
    return FasaConfig(**fields)


def _choices(hint: object) -> set[object]:
    """The values of a Literal, also of one inside a union."""
    return {choice for part in get_args(hint) for choice in (get_args(part) or (part,))}


def check_method(method: object) -> None:
    """Refuse a method that is neither FASA nor a baseline.

    Raises:
        ValueError: with the known methods.
    """
    known = ("fasa", *get_args(Method))
    if method not in known:
        raise ValueError(f"method={method!r} is not known; write one of {', '.join(known)}.")


def scorer_of(
    method: Literal["fasa"] | Method, calibration: Calibration, config: FasaConfig, head_dim: int
) -> Callable[[int], Scorer] | None:
    """The ``scorer=`` argument of `enable` for a method; None for FASA itself."""
    if method == "fasa":
        return None
    return scorer_factory(
        method,
        calibration.profile,
        n_tip=None if "n_tip" in unheard(method) else config.chunks_of(head_dim),
        per=config.per,
        channels=calibration.channels,
        packed_dtype=config.packed_dtype,
    )


def check_batch_size(batch_size: int | str | None) -> None:
    """Refuse ``batch_size=auto``: lm-eval's probe runs dense attention, which needs another amount of memory.

    Raises:
        ValueError: ``auto``, or no positive number.
    """
    if str(batch_size).startswith("auto"):
        raise ValueError(f"batch_size={batch_size} probes memory with dense attention only; pass a number to fasa_hf.")
    if batch_size is not None and not (str(batch_size).isdigit() and int(batch_size)):
        raise ValueError(f"batch_size={batch_size} is no number of requests; pass 1 or more.")


def check_parallel(tp_plan: object, *, loads: bool = True) -> None:
    """Refuse a ``tp_plan`` that lm-eval would not hand over.

    Args:
        tp_plan: option of lm-eval's ``hf`` since 0.4.12: shard the model over the processes of torchrun.
        loads: whether the model is loaded by name, which is when it is sharded.

    Raises:
        ValueError: a model object is given, or the installed lm-eval is older.
    """
    if tp_plan is None:
        return
    if "tp_plan" not in inspect.signature(HFLM.__init__).parameters:
        raise unmet("lm_eval", "shards no model over processes (tp_plan)", since="0.4.12")
    if not loads:
        raise ValueError(
            f"tp_plan={tp_plan!r} shards a model while it is loaded, and a model object is given; pass its folder, or "
            "a model that is sharded already without tp_plan."
        )


def check_tokens(name: str, value: object) -> None:
    """Refuse a value that is no count of tokens.

    Raises:
        ValueError: no int, or a negative one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of tokens, got {value!r}; pass 0 or more.")


def own_names(model_class: type) -> list[str]:
    """The arguments of a model class beside those of lm-eval's ``hf``, the fields of `FasaConfig` included."""
    parameters = inspect.signature(model_class).parameters.values()
    return [*(each.name for each in parameters if each.kind is not each.VAR_KEYWORD), *OPTIONS]


def check_unknown(names: Iterable[str], known: Sequence[str], *, loads: bool) -> None:
    """Refuse misspelt options of ours, which lm-eval would pass on to ``from_pretrained``.

    Args:
        names: arguments that are none of ours.
        known: our own (`own_names`).
        loads: whether the model is loaded by name: ``from_pretrained`` then takes further arguments and refuses unknown
            ones (`refusals_named`). With a model object nothing else would refuse them.

    Raises:
        ValueError: an argument that resembles one of ours, or any unknown one if nothing is loaded.
    """
    for name in sorted(set(names) - set(inspect.signature(HFLM.__init__).parameters)):
        close = _SYNONYMS.get(name) or get_close_matches(name, known, n=1, cutoff=0.8)
        if close or not loads:
            raise ValueError(_unknown(name, known, f"did you mean {close[0]!r}?" if close else ""))


@contextmanager
def refusals_named(known: Sequence[str]) -> Iterator[None]:
    """Turn a model's "unexpected keyword argument" into a ValueError that lists the ``known`` options."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        raise ValueError(_unknown(found[1], known)) from error


def _unknown(name: str, known: Sequence[str], hint: str = "") -> str:
    hint = hint or f"remove it, or take one of {', '.join(known)} or of hf's."
    return f"fasa_hf knows no argument {name!r}; {hint}"


def path_as_written(name: str, path: str | os.PathLike[str] | int) -> str:
    """A path as the user typed it: lm-eval turns both ``12`` and ``012`` into the number 12.

    Raises:
        ValueError: the working directory has several entries with that number.
    """
    if not isinstance(path, int):
        return os.fsdecode(path)
    found = sorted(entry.name for entry in Path().iterdir() if entry.name.isdecimal() and int(entry.name) == path)
    if len(found) > 1:
        raise ValueError(f"{name}={path} may be any of {', '.join(found)}; write ./{found[0]} for the first of them.")
    return found[0] if found else str(path)


def folder_or_profile(profile: object) -> str | FasaProfile | None:
    """The argument ``profile=``, checked: a profile, one of the words ``auto`` and ``prompt``, or a path.

    Raises:
        TypeError: another type.
    """
    if profile is None or isinstance(profile, FasaProfile):
        return profile
    if isinstance(profile, str | os.PathLike | int) and not isinstance(profile, bool):
        return path_as_written("profile", profile)
    raise ArgumentTypeError(
        f"profile={profile!r} is no profile; pass its folder (as ./1.5 where the name is a number), auto, prompt or a "
        "FasaProfile."
    )


def check_source(source: object, profile: str | FasaProfile | None, method: str) -> None:
    """Refuse ``calibration_source`` where nothing is calibrated.

    Raises:
        ValueError: a source beside a profile that exists already.
    """
    if source is not None and profile != AUTO and method not in ("adjacent_pairs", "double_sparsity"):
        raise ValueError(
            f"calibration_source={source} has no effect where nothing is calibrated (profile={profile}); remove it, or "
            "pass profile=auto."
        )
