"""The tables of evals/README.md on agreement of chunks and on calibration."""

from __future__ import annotations

from evals.quality.committed import LARGE, NEEDLE, TEXT, by_kind, markdown, parts_of
from evals.quality.sweep import Rows


def compound() -> str:
    """Agreement as in the paper's Table 1."""
    return _compound(parts_of("agreement")["compound"]["rows"])


def _compound(rows: Rows) -> str:
    lines = [
        ("random chunks", 8),
        ("StreamingLLM", None),
        ("SnapKV", None),
        ("adjacent pairs", 8),
        ("dominant, calibrated on the other kind", 8),
        *(("dominant", chunks) for chunks in (4, 8, 16)),
        ("dominant, per query head", 8),
    ]
    top_ks = (64, 256, 1024)
    return markdown(
        ["keys chosen by", *(f"top {top_k}" for top_k in top_ks)],
        (
            [
                f"{chunks} chunks: {method}" if chunks else method,
                *(by_kind(rows, method=method, chunks=chunks, top_k=top_k) for top_k in top_ks),
            ]
            for method, chunks in lines
        ),
    )


def transfer() -> str:
    """Planes and adjacent pairs, by the length of the calibration documents."""
    rows = parts_of("agreement")["transfer"]["rows"]
    lengths = sorted({row["calibration_length"] for row in rows})
    return markdown(
        ["8 chunks, top 256, calibrated on documents of", *(f"{length} tokens" for length in lengths)],
        (
            [
                planes,
                *(by_kind(rows, planes=planes, calibration_length=n, chunks=8, top_k=256) for n in lengths),
            ]
            for planes in ("true planes", "adjacent pairs")
        ),
    )


def held() -> str:
    """Share of attention on 64 selected tokens, by the group's ranking, and with forced last keys."""
    parts = parts_of("agreement")
    groups = {
        f"8 chunks, group ranked by {how}" if how != "none" else "8 chunks, each query head for itself": by_kind(
            parts["sharing"]["rows"],
            method="dominant",
            per="kv_head",
            group_reduce=how,
            budget=64,
            figure="attention held",
        )
        for how in ("max", "mean", "softmax_exact", "none")
    }
    forced = {
        words: by_kind(parts["mass"]["rows"], method=method, budget=64, layer=None)
        for method, words in {
            "FASA, 8 recent forced": "8 chunks, softmax, last 8 keys forced in",
            "sinks + recent": "sinks + recent",
            "oracle": "all chunks, softmax",
        }.items()
    }
    return markdown(["64 keys chosen by", "attention held"], (list(item) for item in (groups | forced).items()))


def calibration() -> str:
    """Agreement of profiles, by their calibration samples."""
    arms = {
        (row["method"], row["budget"], row["task"]): row
        for name, part in parts_of("calibration").items()
        if name.startswith("lm-eval")
        for row in part["rows"]
    }
    methods = dict.fromkeys(method for method, _, _ in arms)
    return markdown(
        [
            "calibrated on",
            *(f"{what}, {budget} tokens" for what in ("needles", "bits per byte") for budget in (16, 32)),
        ],
        (
            [method, *(f"{arms[method, budget, task]['score']:.3f}" for task in (NEEDLE, TEXT) for budget in (16, 32))]
            for method in methods
        ),
    )


def large_compound() -> str:
    """As `compound`, of the large reference model."""
    return _compound(parts_of("large", LARGE / "cpu")["compound"]["rows"])
