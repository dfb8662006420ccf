"""The options of ``fasa-flex bench``, in a module that does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fasa_flex.core.option_types import Backend, Completion, GroupReduce, PackedDtype

PARTS = ("op", "step", "prefill")
"""Parts of ``--part all``; "serve" takes longer and runs by name alone."""
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("eager", "compiled")
BACKENDS: tuple[Backend, ...] = ("gather", "flex", "triton")
"""Measured backends of FASA-C; triton needs CUDA."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fasa-flex bench``; None means a default of the machine or of `FasaConfig`."""
    parser.add_argument("--part", choices=[*PARTS, "all", "serve"], default="op", help="what to measure (default: op)")
    parser.add_argument("--shapes", type=_words, help="such as llama-3.1-8b, which is the default")
    parser.add_argument("--contexts", type=_numbers, help="tokens, such as 4096,32k (default: 1k to 64k on CPU)")
    parser.add_argument("--batches", type=_numbers, help="rows (default: 1,8; for a step on CPU 1)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, bfloat16 on CUDA)")
    packed = (*get_args(PackedDtype), "cache")
    parser.add_argument("--packed-dtype", choices=packed, default="int4", help="dtype of packed keys (default: int4)")
    parser.add_argument("--completion", choices=get_args(Completion), default="first_order")
    parser.add_argument("--new-tokens", type=int, help="most new tokens of a request of serve (default: 16 or 256)")
    parser.add_argument("--n-tip", type=int, help="dominant chunks (default: as FasaConfig)")
    parser.add_argument("--n-fac", type=int, default=256, help="tokens a query attends to (default: 256)")
    parser.add_argument("--group-reduce", choices=get_args(GroupReduce), help="(default: as in FasaConfig)")
    parser.add_argument("--modes", type=_words, default=MODES, help="eager, compiled or both (default: both)")
    parser.add_argument("--backends", type=_words, help="FASA's backends (default: gather,flex,triton; also: permuted)")
    parser.add_argument("--layers", type=int, help="layers of the model in a step (default: as many as fit)")
    parser.add_argument("--dense-layers", type=_layers, help="dense layers in a step (default: 0, none of a cut model)")
    parser.add_argument("--shares", type=_shares, help="shares of the blocks in a prefill (default: .05,.1,.2,.3)")
    parser.add_argument("--no-model", action="store_true", help="do not time a model's first token (prefill)")
    parser.add_argument("--static-lengths", action="store_true", help="compile each context separately (op)")
    parser.add_argument("--repeats", type=int, default=15, help="most rounds of a row (default: 15)")
    parser.add_argument("--row-seconds", type=float, default=10.0, help="seconds for a row's rounds (default: 10)")
    parser.add_argument("--seconds", type=float, help="start no new row of a part after this many seconds")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and two contexts, to check that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again, and replace the rows in the output")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results (default: runs)")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.lower().split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word[:-1]) * 1024 if word.endswith("k") else int(word) for word in _words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 4096,32k, got {text!r}") from None


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected shares such as 0.1,0.2, got {text!r}") from None


def _layers(text: str) -> tuple[int, ...]:
    return () if text == "none" else _numbers(text)
