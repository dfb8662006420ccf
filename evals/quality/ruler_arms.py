"""Tasks and arms of the RULER evaluation, and their ``lm_eval`` commands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fasa_flex import FasaConfig

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""The six of RULER's thirteen tasks that generate their text; the others download essays, SQuAD or HotpotQA."""
MADE = 500
"""Documents of each length that lm-eval's RULER always generates."""
SHORTEST = 1024


def paper(n_fac: int) -> dict[str, Any]:
    """The fields in which `FasaConfig.paper` differs from the defaults."""
    own, defaults = FasaConfig.paper(n_fac=n_fac).to_dict(), FasaConfig().to_dict()
    return {"n_fac": n_fac, **{name: value for name, value in own.items() if value != defaults[name]}}


ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "fasa 256": {"n_fac": 256},
    "fasa 128": {"n_fac": 128},
    "paper 256": paper(256),
}
"""Fields of `FasaConfig` for each arm; None: lm-eval's own ``hf``."""


@dataclass(frozen=True)
class Model:
    """The model of all arms."""

    pretrained: str
    gguf_file: str | None
    profile: str
    dtype: str = "bfloat16"

    def arguments(self, arm: str) -> dict[str, Any]:
        """An arm's ``--model_args``."""
        own = {"pretrained": self.pretrained, "dtype": self.dtype}
        if self.gguf_file is not None:
            own["gguf_file"] = self.gguf_file
        fields = ARMS[arm]
        return own if fields is None else {**own, "profile": self.profile, "on_truncation": "error", **fields}


@dataclass(frozen=True)
class Questions:
    """The documents of all arms.

    Attributes:
        lengths: tokens of a prompt and its answer as RULER counts them, without the chat template's.
        documents: number of first documents of each length.
        batch: prompts of one batch.
        chat: whether prompts are put into the model's chat template.
    """

    lengths: tuple[int, ...]
    documents: int
    batch: int
    chat: bool

    def samples(self, task: str) -> dict[str, list[int]]:
        """The argument ``--samples``; ``--limit`` would take documents of the first length only."""
        return {task: [MADE * place + number for place in range(len(self.lengths)) for number in range(self.documents)]}


def word(value: object) -> str:
    """A value as written in ``--model_args``."""
    if value is None or value in ((), []):
        return "none"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def command(
    model: Model, asked: Questions, arm: str, task: str, samples: str, tokenizer: str, output: str, device: str
) -> list[str]:
    """The words after ``lm_eval``.

    Args:
        model: the model of all arms.
        asked: the documents of all arms.
        arm: a name in `ARMS`.
        task: a name in `TASKS`.
        samples: numbers of the documents by task, as JSON.
        tokenizer: folder of the model's tokenizer; RULER cannot read it from a GGUF file.
        output: folder of the results.
        device: torch device.
    """
    arguments = ",".join(f"{name}={word(value)}" for name, value in model.arguments(arm).items())
    metadata = {"tokenizer": tokenizer, "max_seq_lengths": list(asked.lengths)}
    return [
        *("--model", "hf" if ARMS[arm] is None else "fasa_hf", "--model_args", arguments),
        *("--tasks", task, "--samples", samples, "--metadata", json.dumps(metadata)),
        *("--batch_size", str(asked.batch), "--device", device),
        *(["--apply_chat_template"] if asked.chat else []),
        *("--output_path", output, "--log_samples"),
    ]
