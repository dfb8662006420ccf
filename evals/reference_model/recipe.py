"""The recipes: architecture, optimisation and curriculum of the reference models, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        name: for the log.
        tokens: training tokens, at most.
        mix: (kind of sequence, length, share of the steps).
        lr: learning rate at the start and at the end of the stage, linear between.
        until: go on to the next stage once the share of right answer tokens over 50 steps reaches this.
    """

    name: str
    tokens: int
    mix: tuple[tuple[str, int, float], ...]
    lr: tuple[float, float]
    until: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, apart from the text.

    Attributes:
        heads, kv_heads: Of 64 dimensions each.
        max_length: positions of the model.
        text_share: share of the sequences whose text has a loss; in the others only answers have one.
        workers: processes that draw sequences ahead; 0 draws them between steps. The sequences are the same.
    """

    stages: tuple[Stage, ...]
    vocab: int = 1024
    width: int = 128
    ffn: int = 352
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 4608
    theta: float = 100_000.0
    weight_decay: float = 0.05
    batch_tokens: int = 4096
    warmup: int = 100
    seed: int = 0
    text_share: float = 1.0
    workers: int = 0


RECIPE = Recipe(
    stages=(
        Stage("copy", 6_000_000, (("copy", 64, 1.0),), (2e-3, 2e-3), until=0.8),
        Stage(
            "bare",
            2_000_000,
            (("bare", 128, 0.5), ("copy", 64, 0.1), ("copy", 256, 0.2), ("echo", 256, 0.2)),
            (2e-3, 2e-3),
            until=0.95,
        ),
        Stage(
            "256",
            3_000_000,
            (("facts", 256, 0.6), ("copy", 512, 0.2), ("echo", 256, 0.1), ("bare", 128, 0.1)),
            (2e-3, 2e-3),
        ),
        Stage(
            "512",
            5_000_000,
            (("facts", 512, 0.6), ("facts", 256, 0.1), ("copy", 1024, 0.2), ("echo", 512, 0.1)),
            (2e-3, 2e-3),
        ),
        Stage(
            "1024",
            6_000_000,
            (("facts", 1024, 0.7), ("facts", 256, 0.1), ("copy", 2048, 0.1), ("echo", 1024, 0.1)),
            (2e-3, 2e-3),
        ),
        Stage(
            "2048",
            7_000_000,
            (("facts", 2048, 0.7), ("facts", 512, 0.1), ("copy", 4096, 0.1), ("echo", 2048, 0.1)),
            (2e-3, 1.2e-3),
        ),
        Stage(
            "4096",
            8_000_000,
            (("facts", 4096, 0.7), ("facts", 1024, 0.2), ("facts", 256, 0.1)),
            (1.2e-3, 0.0),
        ),
    )
)

LARGE = Recipe(
    stages=(
        Stage("copy", 32_000_000, (("copy", 64, 1.0),), (1e-3, 1e-3), until=0.8),
        Stage(
            "bare",
            24_000_000,
            (("bare", 128, 0.5), ("copy", 64, 0.1), ("copy", 256, 0.2), ("echo", 256, 0.2)),
            (1e-3, 1e-3),
            until=0.95,
        ),
        Stage(
            "256",
            8_000_000,
            (("facts", 256, 0.6), ("copy", 512, 0.2), ("echo", 256, 0.1), ("bare", 128, 0.1)),
            (1e-3, 1e-3),
        ),
        Stage(
            "512",
            10_000_000,
            (("facts", 512, 0.6), ("facts", 256, 0.1), ("copy", 1024, 0.2), ("echo", 512, 0.1)),
            (1e-3, 1e-3),
        ),
        Stage(
            "1024",
            14_000_000,
            (("facts", 1024, 0.7), ("facts", 256, 0.1), ("copy", 2048, 0.1), ("echo", 1024, 0.1)),
            (1e-3, 1e-3),
        ),
        Stage(
            "2048",
            18_000_000,
            (("facts", 2048, 0.7), ("facts", 512, 0.1), ("copy", 4096, 0.1), ("echo", 2048, 0.1)),
            (1e-3, 8e-4),
        ),
        Stage(
            "4096",
            22_000_000,
            (("facts", 4096, 0.7), ("facts", 1024, 0.1), ("copy", 8192, 0.1), ("echo", 4096, 0.1)),
            (8e-4, 6e-4),
        ),
        Stage(
            "8192",
            32_000_000,
            (("facts", 8192, 0.7), ("facts", 2048, 0.2), ("facts", 256, 0.1)),
            (6e-4, 0.0),
        ),
    ),
    width=512,
    ffn=1792,
    layers=14,
    heads=8,
    kv_heads=2,
    max_length=8704,
    theta=500_000.0,
    weight_decay=0.5,
    batch_tokens=32_768,
    warmup=100,
    text_share=0.4,
    workers=8,
)
"""45 times the parameters of `SMALL`, twice the length, the same text. Against memorising it, at most some ten passes
have a loss, and weight decay is ten times larger."""

QUICK = Recipe(
    stages=(
        Stage("copy", 20_480, (("copy", 64, 1.0),), (1e-3, 1e-3), until=0.8),
        Stage("256", 10_240, (("facts", 256, 1.0),), (1e-3, 0.0)),
    ),
    width=32,
    ffn=32,
    layers=2,
    max_length=1088,
    batch_tokens=512,
    warmup=2,
    text_share=0.5,
    workers=1,
)
"""A few steps of a tiny model, to test the scripts that follow training."""

RECIPES = {"small": RECIPE, "large": LARGE, "quick": QUICK}
