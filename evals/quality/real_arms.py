"""The arms of the study on real models: methods by name, and named sets of arms with their documents.

A name is ``METHOD BUDGET key=value ...``, such as ``oracle 128 completion=none``. Other fields of
`fasa_flex.FasaConfig` have its defaults, so that methods differ in their ranking only; with the word ``published`` they
are those of the method's paper (`fasa_flex.baselines.as_published`). ``only=5`` keeps all other layers dense. For
``vattention``, ``sample=0.25`` draws a quarter of the budget at random; ``vattention_oracle`` ranks by exact scores.
``blocks=0.2`` prefills by blocks at this share, with an ``estimator=`` of `ESTIMATORS`; ``fasa 1.0 blocks=0.2`` then
decodes densely.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasa_flex import FasaConfig, FasaProfile
from fasa_flex.baselines import AllDimensions, Sampled, as_published, scorer_factory, unheard
from fasa_flex.calibration.profile_scorers import dominant_chunks
from fasa_flex.core.scoring import Scorer, SequenceScorer
from fasa_flex.prefill.estimators import BlockEstimator, Blocks, antidiagonal, oracle, pooled, strided

Factory = Callable[[int], Scorer | SequenceScorer]


def window(blocks: Blocks) -> Tensor:
    """The nearest blocks; the first one is taken in any case."""
    grid = blocks.grid
    behind = grid.diagonal[:, :, None] - torch.arange(grid.n_keys, device=grid.first.device)
    shape = (len(blocks.query), len(blocks.scorer.dims), 1, grid.n_queries, grid.n_keys)
    return (1.0 / (1.0 + behind.clamp(min=0)))[:, None, None].expand(shape)


def random_blocks(blocks: Blocks) -> Tensor:
    """Blocks at random, others in every layer and head, the same in every run."""
    shape = (len(blocks.query), len(blocks.scorer.dims), 1, blocks.grid.n_queries, blocks.grid.n_keys)
    seed = int(blocks.scorer.dims.sum())
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(blocks.query.device)


ESTIMATORS: dict[str, BlockEstimator] = {
    "pooled": pooled,
    "pooled_8": partial(pooled, size=8),
    "pooled_16": partial(pooled, size=16),
    "pooled_by_head": partial(pooled, by_head=True),
    "pooled_strongest": partial(pooled, strongest=True),
    "strided": strided,
    "antidiagonal": antidiagonal,
    "oracle": oracle,
    "oracle_strongest": partial(oracle, strongest=True),
    "window": window,
    "random": random_blocks,
}
"""Estimators by name; `pooled` is the default of `enable`."""


class Reach(NamedTuple):
    """The documents of an arm.

    Attributes:
        windows: number of first windows of each length; None: all.
        prompts: number of first prompts of each length; None: all.
        all_lengths: all lengths, or only those of `Lengths.chosen`: one of windows and two of prompts.
    """

    windows: int | None = None
    prompts: int | None = None
    all_lengths: bool = True


class Lengths(NamedTuple):
    """Tokens of windows and of prompts."""

    windows: tuple[int, ...]
    needles: tuple[int, ...]

    def chosen(self, kind: str) -> tuple[int, ...]:
        """The lengths for arms with few documents: windows of 8192 tokens or the longest, and two of prompts."""
        if kind == "windows":
            return (8192 if 8192 in self.windows else max(self.windows),) if self.windows else ()
        ordered = sorted(self.needles)
        return tuple(ordered) if len(ordered) < 3 else (ordered[1], ordered[-1])


class Arm(NamedTuple):
    """One arm: its config, None for dense attention; ``method`` is one of `scorer_factory`, or ``fasa``."""

    config: FasaConfig | None
    method: str = "fasa"
    n_tip: int | float | None = None
    reach: Reach = Reach()
    sample: float = 0.5
    estimator: str = "pooled"

    def record(self) -> dict[str, Any] | None:
        """Everything that decides the arm's scores, JSON-ready."""
        if self.config is None:
            return None
        own = {"method": self.method, "config": json.loads(json.dumps(self.config.to_dict()))}
        if self.n_tip is not None and self.method != "fasa":
            own["n_tip"] = self.n_tip
        if self.config.prefill == "blocks":
            own["estimator"] = self.estimator
        return {**own, "sample": self.sample} if self.method.startswith("vattention") else own

    def reaches(self, kind: str, length: int, number: int, lengths: Lengths) -> bool:
        """Whether the arm is measured on a document, of which its budget must be at most half."""
        if self.config is None:
            return True
        if self.config.n_fac > length // 2:
            return False
        if not self.reach.all_lengths and length not in lengths.chosen(kind):
            return False
        most = self.reach.windows if kind == "windows" else self.reach.prompts
        return most is None or number < most

    @property
    def sees_prefix(self) -> bool:
        """Whether the method has to see the prefix, since it evicts keys there, or prefills it by blocks."""
        return self.evicts or self.prefills

    @property
    def evicts(self) -> bool:
        """Whether the method drops keys for good."""
        return self.method in ("snapkv", "h2o", "rkv")

    @property
    def prefills(self) -> bool:
        """Whether the prefix is prefilled by blocks."""
        return self.config is not None and self.config.prefill == "blocks"

    def scorer(self, profile: FasaProfile, channels: Callable[[], Tensor]) -> Factory | None:
        """`enable`'s scorer; None for FASA."""
        assert self.config is not None
        if self.method == "fasa":
            return None
        if self.method == "vattention_oracle":
            return lambda layer: Sampled(AllDimensions(), self.sample, seed=layer)
        config = self.config
        if self.method == "vattention":
            ranker = dominant_chunks(profile, config)
            return lambda layer: Sampled(ranker(layer), self.sample, seed=layer)
        chunks = None
        if self.n_tip is not None and "n_tip" not in unheard(self.method):
            chunks = FasaConfig(n_tip=self.n_tip).chunks_of(profile.layout.head_dim)
        return scorer_factory(
            self.method,  # type: ignore[arg-type]  # checked when the command line is parsed
            profile,
            n_tip=chunks,
            per=config.per,
            channels=channels() if self.method == "double_sparsity" else None,
        )


def arms_of(
    names: Iterable[str] | Mapping[str, Reach], backend: str = "auto", layers: Iterable[int] = ()
) -> dict[str, Arm]:
    """Arms by name, ``dense`` first.

    Args:
        names: names of the others, with their `Reach`; without it, all documents.
        backend: backend of the others.
        layers: the model's layers.
    """
    arms = {"dense": Arm(None)}
    reaches = names if isinstance(names, Mapping) else {name: Reach() for name in names}
    for name, reach in reaches.items():
        method, budget, *options = name.split()
        fields: dict[str, Any] = {"n_fac": json.loads(budget), "backend": backend}
        if "published" in options:
            fields |= as_published(method, fields["n_fac"])
        for option in options:
            key, _, value = option.partition("=")
            if option == "published":
                continue
            if key == "only":
                fields["dense_layers"] = tuple(layer for layer in layers if layer != int(value))
                continue
            if key == "blocks":
                fields |= {"prefill": "blocks", "prefill_share": float(value)}
                continue
            try:
                fields[key] = json.loads(value)
            except json.JSONDecodeError:
                fields[key] = value
        sample, estimator = fields.pop("sample", 0.5), fields.pop("estimator", "pooled")
        if estimator not in ESTIMATORS:
            raise ValueError(f"{name!r} names no estimator; write estimator={', '.join(ESTIMATORS)}.")
        config = FasaConfig.paper(**fields) if method == "paper" else FasaConfig(**fields)
        method = "fasa" if method == "paper" else method
        arms[name] = Arm(config, method, fields.get("n_tip"), reach, sample, estimator)
    return arms


DEFAULTS = ("fasa 256", "fasa 128", "fasa 64")
ALL = (
    *DEFAULTS,
    "paper 256",
    "oracle 256 completion=none",
    "sparq 256 published",
    "sparq 128 published",
    "sparq 128 n_tip=0.125 published",
)
"""Arms with all documents."""
CHOSEN = Reach(windows=30, prompts=100, all_lengths=False)
"""Documents of all other arms of the study: of `Lengths.chosen`."""
FEW = Reach(windows=12, prompts=50, all_lengths=False)
"""Documents of prefills by blocks."""


def _of(form: str, *budgets: int) -> list[str]:
    return [form.format(budget) for budget in budgets]


def study(layers: Iterable[int]) -> dict[str, Reach]:
    """Every method that keeps all keys, and every completion with every ranking that estimates logits."""
    few = [
        *_of("fasa {}", 32, 512, 1024),
        *_of("paper {}", 64, 128, 512, 1024),
        *_of("oracle {} completion=none", 32, 64, 128, 512, 1024),
        *_of("sparq {} published", 32, 64, 512, 1024),
        *_of("sparq {} n_tip=0.125 published", 32, 64, 256, 512),
        *_of("sparq {} n_tip=0.125 completion=mean", 64, 128, 256),
        *_of("quest {} published", 64, 128, 256, 512, 1024),
        *_of("double_sparsity {} published", 64, 128, 256, 512, 1024),
        *_of("streaming_llm {} published", 64, 128, 256, 512, 1024),
        *_of("vattention {}", 128, 256, 512),
        *_of("vattention {} sample=0.25", 128, 256),
        *_of("vattention_oracle {}", 128, 256),
        "vattention 64 n_recent=8",
        "vattention_oracle 64 n_recent=8",
        *_of("random_chunks {} published", 64, 128, 256, 512),
    ]
    for completion in ("none", "mean", "first_order"):
        few += [f"oracle {budget} completion={completion}" for budget in (64, 128, 256)]
        rankings = ("paper", "sparq", "random_chunks", "double_sparsity")[completion == "none" :]
        few += [f"{ranking} 128 completion={completion}" for ranking in rankings]
    few += [f"fasa {budget} completion={kind}" for budget in (64, 128, 256) for kind in ("none", "mean")]
    reaches = dict.fromkeys(few, CHOSEN)
    return {**{name: Reach() for name in ALL}, **{name: r for name, r in reaches.items() if name not in ALL}}


def evicting(layers: Iterable[int]) -> dict[str, Reach]:
    """Methods that evict, whose tails are decoded query by query."""
    return {f"{method} {budget} published": CHOSEN for method in ("snapkv", "h2o", "rkv") for budget in (256, 64)}


def defaults(layers: Iterable[int]) -> dict[str, Reach]:
    """The arms with all documents."""
    return {name: Reach() for name in ALL}


def grid(layers: Iterable[int]) -> dict[str, Reach]:
    """The default with one setting changed at a time, at 128 tokens."""
    changes = ["completion_strength=0.5", "completion_strength=0.25", "completion_strength=1.0", "completion=none"]
    changes += ["completion=mean", "criterion=agreement", "criterion=explained_variance", "n_tip=0.25", "n_tip=1.0"]
    changes += ["n_tip=0.25 criterion=explained_variance", "packed_dtype=int8", "n_sink=0 n_recent=0"]
    changes += ["group_reduce=softmax_exact", "group_reduce=max", "per=query_head"]
    names = ["fasa 128", *(f"fasa 128 {change}" for change in changes)]
    return {name: Reach(windows=24, prompts=25, all_lengths=False) for name in names}


def by_layer(layers: Iterable[int]) -> dict[str, Reach]:
    """One sparse layer at a time, with the published settings and with the defaults."""
    reach = Reach(windows=4, prompts=0, all_lengths=False)
    arms = ("fasa 64", "fasa 64 completion=none", "paper 64")
    return {f"{arm} only={layer}": reach for arm in arms for layer in layers}


def prefills(layers: Iterable[int]) -> dict[str, Reach]:
    """Prefills by blocks: shares with sparse and with dense decoding, and other choices of blocks at these shares."""
    shares = (0.1, 0.2, 0.3, 0.5)
    names = [f"fasa 1.0 blocks={share}" for share in shares] + [
        "fasa 256",
        "fasa 256 blocks=0.2",
        "fasa 256 blocks=0.3",
    ]
    names += [f"fasa 1.0 blocks={share} prefill_completion=mean" for share in shares]
    names += ["fasa 1.0 blocks=1.0 prefill_mass=0.9", "fasa 1.0 blocks=1.0 prefill_mass=0.95"]
    names += [f"fasa 1.0 blocks={share} estimator=window" for share in shares]
    names += [f"fasa 1.0 blocks={share} estimator=random" for share in shares[1:3]]
    names += ["fasa 1.0 blocks=0.2 estimator=window prefill_completion=mean"]
    for kind in ("oracle", "pooled_strongest", "pooled_by_head", "strided", "antidiagonal", "pooled_16", "pooled_8"):
        names += [f"fasa 1.0 blocks={share} estimator={kind}" for share in (0.1, 0.2)]
    return dict.fromkeys(names, FEW)


SETS: dict[str, Callable[[Iterable[int]], dict[str, Reach]]] = {
    "study": study,
    "evicting": evicting,
    "defaults": defaults,
    "grid": grid,
    "layers": by_layer,
    "prefill": prefills,
}
