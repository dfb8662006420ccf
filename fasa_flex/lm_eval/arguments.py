"""What ``--model_args`` can say about FASA: its words turned into a configuration, or into one clear sentence."""

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
from fasa_flex.core.scoring import Scorer, SequenceScorer
from fasa_flex.lm_eval.profiles import AUTO, Calibration

LayerSet = int | str | Sequence[int] | None


def layer_set(value: LayerSet) -> tuple[int, ...]:
    """The layers that stay dense: ``0``, ``"0+1"``, ``[0, 1]``; ``"none"`` or ``None`` for no layer.

    The plus sign is there because a comma ends an argument on lm-eval's command line.
    """
    if value is None or value == "none":
        return ()
    if isinstance(value, str):
        words = value.replace("+", " ").split()
        if not all(word.isdigit() for word in words):
            raise ValueError(f"dense_layers={value!r} is not a set of layers: write 0, 0+1 or none")
        return tuple(sorted({int(word) for word in words}))
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"dense_layers={value!r} is not a set of layers: write 0, 0+1 or none")
    return tuple(value)


def budget_weights(value: str | Sequence[Any]) -> Any:
    """`FasaConfig.layer_budgets`: a name, or weights as ``2+1+0.5``, those of a layer's heads as ``2:1+1:1+1:1``."""
    if not isinstance(value, str) or value in ("uniform", "pyramid"):
        return value
    try:
        heads = [[float(weight) for weight in layer.split(":")] for layer in value.replace("+", " ").split()]
    except ValueError:
        raise ValueError(
            f"layer_budgets={value!r} are no weights: write uniform, pyramid, or a number for every layer as in 2+1+0.5"
        ) from None
    return tuple(tuple(layer) if len(layer) > 1 else layer[0] for layer in heads)


OPTIONS = tuple(field.name for field in dataclasses.fields(FasaConfig))
"""Every field of `FasaConfig` is an option of ``--model_args``."""

_WORDS: dict[str, Callable[[Any], Any]] = {"layer_budgets": budget_weights, "dense_layers": layer_set}


_MEANT = {"budget": ["n_fac"], "token_budget": ["n_fac"], "chunks": ["n_tip"], "n_chunks": ["n_tip"]}
"""What other words for our options mean."""


def config_of(method: str, **options: Any) -> FasaConfig:
    """The configuration that the words of the command line mean.

    The word ``none``, of which lm-eval makes None in a string of arguments and nothing on its command line, is a choice
    where an option has it or takes None, and otherwise the default.

    Args:
        method: as `FasaHFLM` knows it; a baseline's defaults are its paper's.
        options: of `OPTIONS`.

    Raises:
        ValueError: an option that the method does not hear, or that is out of its range.
    """
    if options.get("backend") == "fastest":
        raise ValueError(
            "backend='fastest' is dense where that is faster, which would be evaluated in FASA's stead; write auto."
        )
    options = {name: None if value == "none" else value for name, value in options.items()}
    deaf = unheard(method)
    for name in deaf:
        if options.get(name) is not None:
            heard = ", ".join(known for known in RANKING_OPTIONS if known not in deaf) or "none of them"
            raise ValueError(
                f"method={method} does not hear {name}={options[name]}: remove it (of {', '.join(RANKING_OPTIONS)} it "
                f"hears {heard})"
            )
    hints = get_type_hints(FasaConfig)
    meant = {}
    for name, value in options.items():
        if name in _WORDS:
            meant[name] = _WORDS[name](value)
        elif value is not None:
            meant[name] = value
        elif "none" in _choices(hints[name]):
            meant[name] = "none"
        elif getattr(FasaConfig, name) is not None and type(None) in get_args(hints[name]):
            meant[name] = None  # of packed_dtype: the cache's precision
    if method != "fasa":
        meant = {**as_published(method, meant.get("n_fac", FasaConfig.n_fac)), **meant}
    return FasaConfig(**meant)


def _choices(hint: object) -> set[object]:
    """What a Literal names, also one within a union."""
    return {choice for part in get_args(hint) for choice in (get_args(part) or (part,))}


def check_method(method: object) -> None:
    """Refuse what is neither FASA nor a baseline."""
    known = ("fasa", *get_args(Method))
    if method not in known:
        raise ValueError(f"method={method!r} is not one of {', '.join(known)}: write one of these")


def scorer_of(
    method: Literal["fasa"] | Method, calibration: Calibration, config: FasaConfig, head_dim: int
) -> Callable[[int], Scorer | SequenceScorer] | None:
    """`enable`'s scorer for a method; None for FASA itself, which has a profile or finds one in a prompt."""
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
    """Refuse ``batch_size=auto``, whose probe runs dense attention, so it measures another model's memory."""
    if str(batch_size).startswith("auto"):
        raise ValueError(f"batch_size={batch_size} probes memory with dense attention only: pass a number to fasa_hf")
    if batch_size is not None and not (str(batch_size).isdigit() and int(batch_size)):
        raise ValueError(f"batch_size={batch_size} is no number of requests: pass 1 or more")


def check_parallel(tp_plan: object) -> None:
    """Refuse tensor parallelism: each process would hold some of the heads, and a profile describes all of them."""
    if tp_plan is not None:
        raise ValueError(
            f"tp_plan={tp_plan!r} shards the heads over processes and no profile is sharded with them: leave it out, "
            "and use accelerate launch for data parallelism or parallelize=True to spread the layers"
        )


def check_tokens(name: str, value: object) -> None:
    """Refuse what is not a count of tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of tokens, got {value!r}: pass 0 or more")


def check_unknown(given: Iterable[str], *, loads: bool) -> None:
    """Refuse arguments that look like a slip of one of ours, which lm-eval would hand on to ``from_pretrained``.

    Args:
        given: names that are not ours.
        loads: whether the model is loaded by name, so that ``from_pretrained`` takes further arguments, and refuses
            those it does not know (`refusals_named`); with a model object nothing would.
    """
    for name in sorted(set(given) - set(inspect.signature(HFLM.__init__).parameters)):
        close = _MEANT.get(name) or get_close_matches(name, own_names(), n=1, cutoff=0.8)
        if close or not loads:
            raise ValueError(_unknown(name, f"did you mean {close[0]!r}?" if close else ""))


@contextmanager
def refusals_named() -> Iterator[None]:
    """Say what fasa_hf takes where a model says only that it takes an argument not."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        raise ValueError(_unknown(found[1])) from error


def own_names() -> list[str]:
    """The options of fasa_hf beside those of ``hf``."""
    from fasa_flex.lm_eval.model import FasaHFLM

    own = inspect.signature(FasaHFLM.__init__).parameters.values()
    named = [option.name for option in own if option.kind is not option.VAR_KEYWORD and option.name != "self"]
    return [*named, *OPTIONS]


def _unknown(name: str, hint: str = "") -> str:
    hint = hint or f"remove it, or take one of {', '.join(own_names())} or of hf's."
    return f"fasa_hf knows no argument {name!r}; {hint}"


def path_as_written(name: str, path: str | os.PathLike[str] | int) -> str:
    """A path as the command line had it, where lm-eval makes 12 of ``12`` and of ``012``.

    Raises:
        ValueError: several of the names that it may have been are there.
    """
    if not isinstance(path, int):
        return os.fsdecode(path)
    there = sorted(entry.name for entry in Path().iterdir() if entry.name.isdecimal() and int(entry.name) == path)
    if len(there) > 1:
        raise ValueError(f"{name}={path} may be any of {', '.join(there)}: write ./{there[0]} for the first of them")
    return there[0] if there else str(path)


def folder_or_profile(profile: object) -> str | FasaProfile | None:
    """What ``profile=`` means: a profile, a word or the path of one."""
    if profile is None or isinstance(profile, FasaProfile):
        return profile
    if isinstance(profile, str | os.PathLike | int) and not isinstance(profile, bool):
        return path_as_written("profile", profile)
    raise ValueError(
        f"profile={profile!r} is no profile; pass its folder (as ./1.5 where the name is a number), auto, prompt or a "
        "FasaProfile."
    )


def check_source(source: object, profile: str | FasaProfile | None, method: str) -> None:
    """Refuse a text for a calibration that will not take place."""
    if source is not None and profile != AUTO and method not in ("adjacent_pairs", "double_sparsity"):
        raise ValueError(
            f"calibration_source={source} is not heard where nothing is calibrated (profile={profile}); remove it, or "
            "pass profile=auto."
        )
