"""``fasa-flex env``: versions, devices and usable backends, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from fasa_flex.bench.record import hardware, revision
from fasa_flex.calibration.provenance import version_of
from fasa_flex.lm_eval.profiles import default_cache

_PACKAGES = (
    "fasa-flex", "torch", "transformers", "huggingface_hub", "safetensors", "numpy", "triton", "lm-eval", "matplotlib",
    "accelerate", "peft", "gguf",
)  # fmt: skip
_VARIABLES = ("FASA_FLEX_NO_STARTUP", "HF_HUB_OFFLINE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME")


def report() -> str:
    """The report, one fact a line."""
    return "\n".join(f"{name}: {value}" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield name, version_of(name)
    source = revision()
    if source is not None:
        yield "source tree", source
    cpu = hardware(torch.device("cpu"))
    yield "cpu", f"{cpu['cpu']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}"
    yield "cuda", torch.version.cuda or "none in this torch"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"gpu {number}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory >> 20} MiB"
    yield "backend auto", _auto()
    yield "backend triton", _kernels()
    yield "lm_eval --model fasa_hf", _lm_eval()
    yield "pictures", "yes" if find_spec("matplotlib") else "no: pip install 'fasa-flex[plots]'"
    yield "profiles of profile=auto", _profiles()
    for name in _VARIABLES:
        if name in os.environ:
            yield name, os.environ[name] if name != "XDG_CACHE_HOME" else "set"


def _auto() -> str:
    if not torch.cuda.is_available():
        return "gather"
    return "triton where it can, flex elsewhere" if find_spec("triton") else "flex"


def _kernels() -> str:
    if find_spec("triton") is None:
        return "no: triton is not installed"
    return "yes" if torch.cuda.is_available() else "no: it needs a CUDA device"


def _lm_eval() -> str:
    if find_spec("lm_eval") is None:
        return "no: pip install 'fasa-flex[lm-eval]'"
    if os.environ.get("FASA_FLEX_NO_STARTUP"):
        return "switched off by FASA_FLEX_NO_STARTUP; python -m fasa_flex.lm_eval knows it"
    return "yes" if "_fasa_flex_startup" in sys.modules else "no start-up hook here; python -m fasa_flex.lm_eval has it"


def _profiles() -> str:
    return f"{len(list(default_cache().glob('*/config.json')))} kept"
