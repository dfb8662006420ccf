"""Comparison of the criteria in one model: their chunks, the explained variance, and the attention on selected keys.

    python -m evals.quality.criteria FOLDER TEXT [TEXT ...] [--gguf-file FILE] > criteria.json

One passage of each text is for calibration; a later one is measured at its last tokens. Prints JSON with figures of
each layer, for every number of chunks and criterion. ``common``: share of the chunks that variance also chooses.
``place``: their mean place by frequency, from 0 (fastest) to 1 (slowest). ``explained``: share of the logits' variance
that they explain with the best weights. ``held``: share of attention on the best keys (one selection a group).
``recent``: share of these keys among the latest. ``correlation``: Spearman's correlation over a head's chunks between
agreement and variance, and between agreement with and without the latest keys (``far``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.quality.steps import Steps, attention, held, ranked, shared_ranking, valid_of
from fasa_flex import RotaryLayout, contextual_agreement
from fasa_flex.core import criteria
from fasa_flex.hf.attention_call import AttentionCall
from fasa_flex.hf.attention_routing import reading
from fasa_flex.hf.loading import load_model

TOKENS, STEPS, RECENT, BUDGET, TOP_KS = 1024, 32, 64, 64, (256, 32)


@torch.no_grad()
def steps_of(model: Any, ids: Tensor) -> Steps:
    """Scaled queries and keys of every layer, from one dense forward of the passage."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        seen[call.layer] = call.query[0].float() * call.scaling, call.key[0].float()

    with reading(model, keep):
        model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    query, key = (torch.stack([seen[layer][i] for layer in sorted(seen)]).cpu() for i in range(2))
    return Steps.last(query, key, STEPS)


def agreement(steps: Steps, layout: RotaryLayout, top_k: int, drop: int = 0) -> Tensor:
    """Contextual agreement of all layers, float64 [L, Hq, chunks], without the ``drop`` latest keys."""
    pairs = zip(steps.query, steps.key[:, :, : steps.key.shape[2] - drop], strict=True)
    return torch.stack([contextual_agreement(q[None], k[None], layout, top_k) for q, k in pairs]).double()


def statistics(steps: Steps, layout: RotaryLayout, name: str) -> Tensor:
    """The table ``name`` of `LogitStatistics`, for all layers."""
    visible = valid_of(steps)[:, 0, 0]
    pairs = zip(steps.query[:, None], steps.key[:, None], strict=True)
    return torch.stack([getattr(criteria.logit_statistics(q, k, visible, layout.chunks, 1.0), name) for q, k in pairs])


def mean(tables: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tables)).mean(0)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation over chunks, averaged over heads: [L]."""
    ranks = torch.stack([one, other]).argsort(-1).argsort(-1).double()
    return torch.nn.functional.cosine_similarity(*(ranks - ranks.mean(-1, keepdim=True)), dim=-1).mean(1)


def found(steps: Steps, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``held`` and ``recent`` of each layer, for scores with these weights [L, Hkv, D] of the dimensions."""
    valid, queries = valid_of(steps), steps.query.unflatten(1, (weights.shape[1], -1)) * weights[:, :, None, None]
    slots = ranked(shared_ranking(queries @ steps.key[:, :, None].mT, valid, 1.0), valid)
    recent = slots[..., :BUDGET] >= TOKENS - STEPS - RECENT
    return held(attention(steps, 1.0), slots, BUDGET).mean(1), recent.double().mean((1, 2, 3, 4))


def report(layout: RotaryLayout, known: list[Steps], measured: list[Steps]) -> dict[str, Any]:
    """All figures, from passages to calibrate on and to measure."""
    tables = {f"agreement of {k}": mean(agreement(s, layout, k) for s in known) for k in TOP_KS}
    first, far = tables[f"agreement of {TOP_KS[0]}"], mean(agreement(s, layout, TOP_KS[0], RECENT) for s in known)
    tables["variance"] = mean(statistics(s, layout, "variance") for s in known)
    covariance = mean(statistics(s, layout, "covariance") for s in known)
    heads = {name: table.unflatten(1, (covariance.shape[1], -1)).mean(2) for name, table in tables.items()}
    chunks = len(layout.chunks)
    out = {"correlation": {"variance": correlation(first, tables["variance"]), "far": correlation(first, far)}}
    for n_tip in (chunks // 4, chunks // 2):
        chosen = {name: table.argsort(-1, descending=True)[..., :n_tip] for name, table in heads.items()}
        chosen["explained_variance"] = chosen["weighted_variance"] = criteria.most_explaining(covariance, n_tip)
        chosen["all"] = torch.arange(chunks).expand_as(covariance[..., 0])
        for name, own in chosen.items():
            fitted = criteria.least_squares_weights(covariance, own) if "weighted" in name else torch.ones(own.shape)
            weights = torch.zeros(*own.shape[:2], chunks).scatter(-1, own, fitted).repeat_interleave(2, dim=-1)
            weights = weights[..., layout.chunks.flatten().argsort()]
            finds = [found(steps, weights) for steps in measured]
            out[f"{n_tip} by {name}"] = {
                "common": (own[..., None] == chosen["variance"][..., None, :]).any(-1).double().mean((1, 2)),
                "place": own.double().mean((1, 2)) / (chunks - 1),
                "explained": criteria.explained_share(covariance, own).mean(1),
                **dict(zip(("held", "recent"), map(mean, zip(*finds, strict=True)), strict=True)),
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--gguf-file")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, gguf_file=options.gguf_file, dtype="float32")
    ids = [torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:200_000]).input_ids) for text in options.texts]
    known, measured = ([steps_of(model, t[len(t) // n :][:TOKENS]) for t in ids] for n in (10, 2))
    rounded = json.JSONEncoder(default=lambda table: [round(x, 4) for x in table.tolist()])
    print(rounded.encode(report(RotaryLayout.detect(model), known, measured)))


if __name__ == "__main__":
    main()
