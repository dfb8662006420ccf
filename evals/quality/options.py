"""The tables of evals/evaluate.md: every option of ``--model_args``, from signatures and docstrings.

python -m evals.quality.options          # writes the page
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from evals.marked import fill
from evals.quality.arms import ROOT
from fasa_flex import FasaConfig
from fasa_flex.baselines import Method
from fasa_flex.lm_eval.arguments import OPTIONS, config_of, own_names
from fasa_flex.lm_eval.model import FasaHFLM

PAGE = ROOT / "evals" / "evaluate.md"
EXAMPLE = ROOT / "evals" / "examples" / "simple_evaluate.py"
VALUES = {
    "pretrained": "a folder, a name on the Hub; from Python a model, too",
    "profile": "a folder, a name on the Hub, `auto`, `prompt`; from Python a `FasaProfile`, too",
    "sparse_tail": "tokens",
    "dense_prefix": "tokens",
    "calibration_source": "`facts`, the path of a text file",
    "profile_cache": "a folder",
    "batch_size": "1 and more",
    "n_tip": "chunks (`16`), a share of them (`0.5`)",
    "n_fac": "tokens (`256`), a share of the keys (`0.1`)",
    "n_sink": "tokens",
    "n_recent": "tokens",
    "layer_budgets": "`uniform`, `pyramid`, a weight for each layer (`2+1+0.5`) or for each of its heads (`2:1+1:1`)",
    "dense_layers": "`0`, `0+1`, `none`; from Python a list, too",
    "completion_strength": "a number",
    "prefill_share": "a share (`0.3`)",
    "prefill_mass": "a share (`0.9`), `none`",
}
"""Values of the options that are not a choice between words, as written on the command line."""


def rows() -> list[tuple[str, str, str, str]]:
    """Name, default, values and meaning of every option, in the order of the signatures."""
    signature = inspect.signature(FasaHFLM.__init__).parameters
    defaults = {name: signature[name].default for name in own_names(FasaHFLM) if name not in OPTIONS}
    defaults |= {field.name: field.default for field in dataclasses.fields(FasaConfig)}
    hints = {**get_type_hints(FasaHFLM.__init__), **get_type_hints(FasaConfig)}
    meanings = {**arguments_of(FasaHFLM), **arguments_of(FasaConfig)}
    return [
        (name, written(name, defaults[name]), values_of(name, hints[name], defaults[name]), meanings[name])
        for name in own_names(FasaHFLM)
    ]


def table() -> str:
    """The rows in Markdown."""
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {default} | {values} | {meaning} |" for name, default, values, meaning in rows()]
    return "\n".join(lines)


def published() -> str:
    """The baselines' own defaults, in Markdown."""
    own = FasaConfig().to_dict()
    methods: dict[str, list[str]] = {}
    for method in get_args(Method):
        config = config_of(method).to_dict()
        changed = [f"`{name}={_word(value)}`" for name, value in config.items() if value != own[name]]
        methods.setdefault(", ".join(changed), []).append(f"`{method}`")
    return "\n".join(f"- {', '.join(names)}: {changed}" for changed, names in methods.items())


def arguments_of(documented: type) -> dict[str, str]:
    """The description of each argument in a class's section ``Args``, as one line of Markdown."""
    section = (inspect.getdoc(documented) or "").split("Args:\n", 1)[1].split("\n\n", 1)[0]
    entries = re.split(r"\n?^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: _markdown(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def written(name: str, default: Any) -> str:
    """A default as written in ``--model_args``."""
    if default is inspect.Parameter.empty:
        return "required"
    if name == "dense_layers":
        return f"`{'+'.join(map(str, default)) or 'none'}`"
    return "–" if default is None else f"`{default}`"


def values_of(name: str, hint: object, default: object) -> str:
    """The values of an option: those in `VALUES`, or the words of its type."""
    if name in VALUES:
        return VALUES[name]
    words = [word for word in _words(hint) if word != "fastest"]  # fasa_hf refuses it
    words += ["none"] if default is not None and type(None) in get_args(hint) else []
    return ", ".join(f"`{word}`" for word in words)


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def _words(hint: object) -> list[str]:
    """The values of a Literal, also of one inside a union."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    return [word for part in get_args(hint) for word in _words(part)]


def _markdown(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().rstrip(".;")
    text = re.sub(r'``"?([^`="]*)"?``', r"`\1`", text).replace("``", "`")
    return text[:1].upper() + text[1:].replace("|", "\\|")


def example() -> str:
    """The file of the Python example, as a block of Markdown."""
    return f"```python\n{EXAMPLE.read_text().strip()}\n```"


TABLES = {"options": table, "published": published, "example": example}

if __name__ == "__main__":
    fill(PAGE, TABLES)
