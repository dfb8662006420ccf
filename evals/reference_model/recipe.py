"""The recipe: architecture, optimisation and curriculum of the reference model, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        name: For the log.
        tokens: Training tokens, at most.
        mix: (kind of sequence, length, share of the steps).
        lr: Learning rate at the start and at the end of the stage, linear between.
        until: Go on to the next stage once the share of right answer tokens over 50 steps reaches this.
    """

    name: str
    tokens: int
    mix: tuple[tuple[str, int, float], ...]
    lr: tuple[float, float]
    until: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, apart from the text."""

    stages: tuple[Stage, ...]
    vocab: int = 1024
    width: int = 128
    ffn: int = 352
    layers: int = 4
    theta: float = 100_000.0
    weight_decay: float = 0.05
    batch_tokens: int = 4096
    warmup: int = 100
    seed: int = 0


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
