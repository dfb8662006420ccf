"""Agreement of dominant chunks with full attention, FASA's premise, in dense forwards of the reference model.

    python -m evals.quality.agreement          # under ten minutes on one core; --quick: seconds, with wide intervals

Chunks are chosen on documents of training text and measured on documents of held-out text, in decode steps that answer
and in decode steps that write plain text. Each kind of step has its own calibration unless the row says otherwise.
Every figure is a mean over documents, steps, layers and query heads, with a 95 % bootstrap interval over documents. The
documents are cut from one text of some 40 contexts, so they may overlap, but their steps hardly do. Writes
``agreement.json`` and pictures to ``evals/results/study/``; a second start continues a stopped run.

Parts: ``compound`` (the paper's Table 1; true planes and adjacent pairs; sets per KV head and per query head),
``transfer`` (calibrated on shorter documents), ``sharing`` (one selection of a group), ``quintiles`` (the paper's
Table 11), ``mass`` (attention on the selected keys), ``precision`` (packed keys in fewer bits) and ``renewal`` (keys
that a step selects and the last step did not).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from evals.quality.arms import RESULTS, PartLedger, provenance, quiet
from evals.quality.cached_keys import precision, renewal
from evals.quality.documents import QUICK, STEPS, Rows, Settings, Study
from evals.quality.steps import (
    BUDGETS,
    DEEPEST,
    N_TIP,
    TOP_K,
    WINDOW,
    Steps,
    attention,
    dominant,
    found,
    held,
    oracle,
    overlap,
    ranked,
    scored,
    shared_ranking,
    sinks_and_recent,
    snapkv,
    valid_of,
)
from fasa_flex.baselines import scorer_factory
from fasa_flex.core.budget import Budget
from fasa_flex.core.config import GroupReduce, Sharing
from fasa_flex.core.selection import forced_keys

CHUNKS = (2, 4, 6, 8, 12, 16)
TOP_KS = (16, 64, 256, 512, 1024)
RECENT = 8
"""Number of forced last keys, in the rows with forced keys."""
TRANSFER_TOP_K = 128
"""K of the calibrations on documents as short as 512 tokens."""
FIFTHS = 5
REDUCTIONS: tuple[GroupReduce, ...] = ("max", "mean", "softmax_exact", "none")
OTHER = {"answer": "text", "text": "answer"}


def compound(study: Study) -> Rows:
    """Agreement of chunk sets, StreamingLLM and SnapKV with each head's own top-K; no group shares a selection."""

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid = valid_of(steps)
        full = ranked(scored(oracle, steps), valid)
        static = {
            "StreamingLLM": sinks_and_recent(steps),
            "SnapKV": snapkv(steps, study.scaling),
            "random keys": ranked(
                torch.rand(full.shape[:-1] + valid.shape[-1:], generator=_seeded()).to(valid.device), valid
            ),
        }
        figures = {
            (method, None, top_k): overlap(full, slots, top_k)
            for method, slots in static.items()
            for top_k in TOP_KS
            if method != "SnapKV" or top_k > WINDOW  # a smaller budget holds only SnapKV's own window
        }
        own, other = study.profiles[kind, "true planes"], study.profiles[OTHER[kind], "true planes"]
        adjacent = study.profiles[kind, "adjacent pairs"]
        for chunks in CHUNKS:
            methods = {
                "dominant": dominant(own, chunks),
                "dominant, per query head": dominant(own, chunks, "query_head"),
                "dominant, calibrated on the other kind": dominant(other, chunks),
                "adjacent pairs": dominant(adjacent, chunks),
                "adjacent pairs, per query head": dominant(adjacent, chunks, "query_head"),
                **{
                    f"draw {draw}": scorer_factory("random_chunks", own, n_tip=chunks, seed=draw)
                    for draw in range(study.settings.draws)
                },
            }
            for method, scorers in methods.items():
                slots = ranked(scored(scorers, steps), valid)
                figures |= {(method, chunks, top_k): overlap(full, slots, top_k) for top_k in TOP_KS}
            for top_k in TOP_KS:
                drawn = [figures[f"draw {draw}", chunks, top_k] for draw in range(study.settings.draws)]
                figures["random chunks", chunks, top_k] = torch.stack(drawn).mean(0)
        return figures

    rows = study.rows(measure, "method", "chunks", "top_k")
    drawn = [row for row in rows if row["method"].startswith("draw ")]
    kept = [row for row in rows if row not in drawn]
    for row in kept:
        if row["method"] == "random chunks":
            means = [d["mean"] for d in drawn if all(d[name] == row[name] for name in ("queries", "chunks", "top_k"))]
            row["spread_of_draws"] = round(float(torch.tensor(means).std()), 4)
    return kept


def transfer(study: Study) -> Rows:
    """Agreement of chunk sets chosen on documents of another length, for true planes and adjacent pairs.

    A plane's part of a dot product depends only on the distance of query and key, that of two other dimensions also on
    their positions.
    """
    profiles = {length: study.calibrated(length, TRANSFER_TOP_K) for length in study.settings.calibration_lengths}

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid = valid_of(steps)
        full = ranked(scored(oracle, steps), valid)
        slots = {
            (pairing, length, chunks): ranked(scored(dominant(several[kind, pairing], chunks), steps), valid)
            for length, several in profiles.items()
            for pairing in study.layouts
            for chunks in (4, N_TIP, 16)
        }
        return {(*key, top_k): overlap(full, best, top_k) for key, best in slots.items() for top_k in (64, 256)}

    return study.rows(measure, "planes", "calibration_length", "chunks", "top_k")


def sharing(study: Study) -> Rows:
    """One selection of a GQA group: agreement with each head's own top-K, and the share of attention on its keys."""

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid, weights = valid_of(steps), attention(steps, study.scaling)
        profile = study.profiles[kind, "true planes"]
        full = ranked(scored(oracle, steps), valid)
        figures = {}
        for per in get_args(Sharing):
            tip = scored(dominant(profile, N_TIP, per), steps)
            for method, scores in {
                "dominant": tip,
                **({"oracle": scored(oracle, steps)} if per == "kv_head" else {}),
            }.items():
                for how in REDUCTIONS:
                    slots = ranked(shared_ranking(scores, valid, study.scaling, how), valid)
                    for budget in BUDGETS:
                        figures[method, per, how, budget, "agreement"] = overlap(full, slots, budget)
                        figures[method, per, how, budget, "attention held"] = held(weights, slots, budget)
        return figures

    return study.rows(measure, "method", "per", "group_reduce", "budget", "figure")


def quintiles(study: Study) -> Rows:
    """Share of a head's own top-K that a method finds, by fifths of attention weight (1: the largest)."""

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid = valid_of(steps)
        full = ranked(scored(oracle, steps), valid)
        profile = study.profiles[kind, "true planes"]
        methods = {
            "dominant": ranked(scored(dominant(profile, N_TIP), steps), valid),
            "random chunks": ranked(scored(scorer_factory("random_chunks", profile, n_tip=N_TIP), steps), valid),
            "StreamingLLM": sinks_and_recent(steps),
        }
        return {
            (method, top_k, fifth): part.mean((-1, -2)).flatten(1)
            for method, slots in methods.items()
            for top_k in (64, 256)
            for fifth, part in enumerate(found(full, slots, top_k).tensor_split(FIFTHS, dim=-1), 1)
        }

    return study.rows(measure, "method", "top_k", "fifth")


def mass(study: Study) -> Rows:
    """Share of each head's attention on the selected keys, and the number of keys with nine tenths of it."""

    def measure(kind: str, steps: Steps) -> dict[Any, Tensor]:
        valid, weights = valid_of(steps), attention(steps, study.scaling)
        exact = scored(oracle, steps)
        tip = scored(dominant(study.profiles[kind, "true planes"], N_TIP), steps)
        shared = shared_ranking(tip, valid, study.scaling)
        recent = forced_keys(valid, Budget(RECENT, n_recent=RECENT))
        methods = {
            "FASA": ranked(shared, valid),
            f"FASA, {RECENT} recent forced": ranked(shared, valid, first=recent),
            "oracle": ranked(shared_ranking(exact, valid, study.scaling), valid),
            "oracle, each head for itself": ranked(exact, valid),
            "sinks + recent": sinks_and_recent(steps),
        }
        figures = {
            (method, budget): held(weights, slots, budget) for method, slots in methods.items() for budget in BUDGETS
        }
        needed = 1 + (weights.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1)
        figures["keys for 90 %", None] = needed.float().mean(-1).flatten(1)
        heads = {
            (*key, layer, head): table[layer, head]
            for key, table in figures.items()
            for layer in range(table.shape[0])
            for head in range(table.shape[1])
        }
        return {(*key, None, None): table for key, table in figures.items()} | heads

    return study.rows(measure, "method", "budget", "layer", "query_head")


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PARTS = (compound, transfer, sharing, quintiles, mass, precision, renewal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short documents, to test the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder (default: evals/results/study)")
    options = parser.parse_args()
    from evals.quality.pictures import agreement_curves, mass_by_head, transfer_curves  # parts need no matplotlib

    quiet()
    study = Study(QUICK if options.quick else Settings())
    settings = {**vars(study.settings), "calibrated_at": TOP_K, "deepest": DEEPEST, "n_tip": N_TIP, "steps": STEPS}
    ledger = PartLedger(options.out / "agreement.json", provenance(time.time()))
    rows = {}
    for part in PARTS:
        rows[part.__name__] = ledger.part(part.__name__, settings, lambda part=part: part(study))
        print(f"{part.__name__}: {len(rows[part.__name__])} rows", flush=True)
    agreement_curves(rows["compound"]).savefig(options.out / "agreement.png", dpi=150)
    transfer_curves(rows["transfer"]).savefig(options.out / "transfer.png", dpi=150)
    mass_by_head(rows["mass"]).savefig(options.out / "mass.png", dpi=150)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
