"""Checks that a model on two GPUs, or on the second GPU, decodes the same tokens as on the first.

    python -m evals.bench.check_spread --out runs                      # on two GPUs, with accelerate
    python -m evals.bench.check_spread --devices cpu,cpu --steps 8     # a dry run

Uses the model of `evals.bench.check_cuda`, uncompiled, in `generate`, with every kind of cache and each backend for
decoding on CUDA. Writes JSON after every check. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from evals.bench.check_cuda import decoding_model
from fasa_flex import FasaCache, FasaConfig, FasaProfile, enable
from fasa_flex.bench.record import RowLedger, command_line, provenance, reason_of
from fasa_flex.hf.compatibility import cache_argument

SETTINGS: tuple[dict[str, Any], ...] = ({}, {"packed_dtype": "int8"}, {"backend": "gather"}, {"backend": "fastest"})
CACHES = ("growing", "static", "own, static", "host, growing", "host, static")
PROMPT = 700


def places(model: PreTrainedModel, devices: list[str]) -> dict[str, tuple[PreTrainedModel, str]]:
    """The model on each device and on both, with the device of its prompt."""
    first, second = devices
    halves = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    halves |= {"model.layers.1": second, "model.layers.2": second, "model.norm": second, "lm_head": second}
    return {
        "first": (copy.deepcopy(model).to(first), first),
        "second": (copy.deepcopy(model).to(second), second),
        "both": (dispatch_model(copy.deepcopy(model), halves), first),
    }


@torch.no_grad()
def decode(
    model: PreTrainedModel, device: str, profile: FasaProfile, config: FasaConfig, cache: str, steps: int
) -> tuple[Tensor, Tensor, int]:
    """Greedy tokens [2, steps], their logits [steps, 2, V], and the sparse queries."""
    prompt = torch.randint(3, 512, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    length = PROMPT + steps if "static" in cache else None
    options: dict[str, Any] = {"disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    elif cache != "growing":
        placement: Any = "host" if "host" in cache else "device"
        state = FasaCache(model, profile, config, placement=placement, max_cache_len=length)
        options.update(cache_argument(model, state))
    with enable(model, profile, config) as fasa:
        out = model.generate(
            prompt, max_new_tokens=steps, do_sample=False, output_scores=True, return_dict_in_generate=True, **options
        )
        return out.sequences[:, PROMPT:].cpu(), torch.stack(out.scores).float().cpu(), fasa.stats.sparse_queries


def compare(got: tuple[Tensor, Tensor, int], expected: tuple[Tensor, Tensor, int]) -> dict[str, Any]:
    """Whether the tokens are the same, and the largest difference of their logits."""
    tokens, logits, sparse = got
    same = int((tokens == expected[0]).all(0).int().cumprod(0).sum())
    error = float((logits[:same] - expected[1][:same]).norm() / expected[1][:same].norm())
    right = same == tokens.shape[1] and error < 1e-4 and sparse == expected[2]
    return {"same_tokens": same, "logits_error": error, "sparse_queries": sparse, "ok": right}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for check_spread.json (default: runs)")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="two devices (default: cuda:0,cuda:1)")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    devices = options.devices.split(",")
    model, profile = decoding_model(torch.device(devices[0]))
    head = provenance(command_line("evals.bench.check_spread"), torch.device(devices[0]))
    ledger = RowLedger(options.out / "check_spread.json", {**head, "settings": {"steps": options.steps}}, fresh=True)
    where = places(model, devices)
    for settings in SETTINGS:
        config = FasaConfig(n_fac=64, **settings)
        for cache in CACHES:
            expected = None
            for place, (placed, device) in where.items():
                try:
                    got = decode(placed, device, profile, config, cache, options.steps)
                    expected = expected or got
                    row = compare(got, expected)
                except Exception as error:
                    row = {"ok": False, "reason": reason_of(error)}
                ledger.add({**settings, "cache": cache, "place": place, **row})
                print(settings, cache, place, row, flush=True)
    return 0 if all(row["ok"] for row in ledger.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
