"""Errors of sparse attention by layer and head, with dense attention in all earlier layers.

    python -m evals.quality.real_heads --pretrained FOLDER --gguf-file FILE --text BOOK --calibrate BOOK \
        --profile FOLDER --windows 4 --arm "fasa 128" --arm "paper 128" --out JSON

In each layer the tail's queries attend under the arm and densely; the model continues with the dense output, so that a
layer's error does not depend on other layers. The error of a query head is the norm of the difference relative to that
of the dense output, as a root mean square over the tail's queries. ``evals.quality.real --arms layers`` measures the
perplexity with one sparse layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evals.quality.arms import provenance
from evals.quality.real import Run, parser
from evals.quality.real_arms import Arm
from fasa_flex.backends.table import sparse_attention
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.completion import Completion
from fasa_flex.core.method import Call
from fasa_flex.core.scoring import DominantChunks, Scorer
from fasa_flex.core.selection import valid_keys
from fasa_flex.core.softmax import Softmax
from fasa_flex.hf.attention_call import AttentionCall, AttentionResult
from fasa_flex.hf.attention_routing import AttentionSeam
from fasa_flex.saving import replace_text


def errors_of(loaded: Run, arms: Mapping[str, Arm], windows: int) -> dict[str, dict[str, list[float]]]:
    """Errors of every query head, by arm and layer, without layers that cannot be sparse."""
    squares: dict[str, dict[int, list[Tensor]]] = {name: {} for name in arms}
    length = loaded.lengths.chosen("windows")[0]
    scorers = {name: _scorers(loaded, arm) for name, arm in arms.items()}
    prefix = 0

    def measure(call: AttentionCall) -> AttentionResult:
        layer, (out, weights) = call.layer, call.run_dense()
        if layer not in loaded.dense_layers:
            exact = out[:, prefix:].transpose(1, 2).float()
            for name, arm in arms.items():
                focused = _focused(arm, scorers[name](layer), call, prefix).float()
                error = (focused - exact).norm(dim=-1) / exact.norm(dim=-1)
                squares[name].setdefault(layer, []).append(error.square().mean((0, 2)).cpu())
        return out, weights

    with torch.no_grad(), AttentionSeam(loaded.model, measure):
        for number in range(windows):
            document = loaded.documents.make("windows", length, number, windows)
            prefix = document.prefix
            loaded.model(document.ids[None].to(loaded.model.device), use_cache=False, logits_to_keep=1)
    return {
        name: {str(layer): torch.stack(held).mean(0).sqrt().tolist() for layer, held in by_layer.items()}
        for name, by_layer in squares.items()
    }


def _scorers(loaded: Run, arm: Arm) -> Any:
    assert arm.config is not None
    if arm.method == "fasa":
        return dominant_chunks(loaded.profile, arm.config)
    return arm.scorer(loaded.profile, loaded.channels)


def _focused(arm: Arm, scorer: Scorer, call: AttentionCall, prefix: int, step: int = 64) -> Tensor:
    """Sparse attention of the queries from ``prefix`` on, in pieces: [B, Hq, Q, Dv]."""
    query, key, config = call.query, call.key, arm.config
    assert config is not None
    if isinstance(scorer, DominantChunks):
        scorer = scorer.to(query.device)
        if scorer.dtype is None and config.per == "kv_head":
            scorer = replace(scorer, dtype=config.packed_dtype)
    kind = config.completion or ("first_order" if arm.method == "fasa" and config.per == "kv_head" else "none")
    strength = config.completion_strength if kind == "first_order" else 0.0
    by_all = scorer.completes_by_all
    completion = None if kind == "none" else Completion(strength, by_all=by_all)
    reduce = "none" if config.per == "query_head" else config.group_reduce
    valid = valid_keys(query.shape[2] - prefix, key.shape[2], None, query.device)
    parts = [
        sparse_attention(
            Call(
                query[:, :, prefix + at : prefix + at + step],
                key,
                call.value,
                scorer,
                valid[:, :, :, at : at + step],
                config.budget,
                reduce,
                Softmax(call.scaling),
                completion=completion,
            ),
            "gather",
        )
        for at in range(0, query.shape[2] - prefix, step)
    ]
    return torch.cat(parts, dim=2)


def main() -> None:
    """Measure the errors and write the file."""
    began, options = time.time(), parser(__doc__).parse_args()
    loaded = Run(options)
    arms = {name: arm for name, arm in loaded.arms.items() if arm.config is not None}
    errors = errors_of(loaded, arms, options.windows)
    results = {**provenance(began), **loaded.settings, "windows": options.windows, "errors": errors}
    replace_text(options.out, json.dumps(results, indent=1) + "\n")
    for name, by_layer in errors.items():
        print(name, *(f"{layer}:{sum(heads) / len(heads):.3f}" for layer, heads in by_layer.items()))


if __name__ == "__main__":
    main()
