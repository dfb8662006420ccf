"""The same cases in one process and in the ranks of a tensor-parallel model, and a way to run them in two.

A case takes the open `Room` and returns tensors and plain values; `in_two_processes` returns those of each rank.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from generation import generate
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from fasa_flex import FasaCache, FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.baselines import channel_weights, scorer_factory
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.wrappers import unwrapped

RANKS, PROMPT = 2, 200
HEADS = ((1, 3), (3, 1), (2, 1))
"""Weights of the budgets of three layers' key/value heads."""


@dataclass
class Room:
    """What a case finds: models and a profile in ``folder``, and whether it runs on ranks."""

    folder: Path
    ranks: int = 1

    def model(self, name: str = "Llama", **options: Any) -> PreTrainedModel:
        """A model of a folder, whole or this rank's part of it; ``options``: of `DistributedConfig`, or `eager`."""
        attention = "eager" if options.pop("eager", False) else "sdpa"
        parallel = {"distributed_config": DistributedConfig(**(options or {"tp_size": self.ranks}))}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder / name, attn_implementation=attention, **(parallel if self.ranks > 1 else {})
        )
        return model.eval()

    def profile(self) -> FasaProfile:
        return FasaProfile.from_pretrained(self.folder / "profile")

    @property
    def prompt(self) -> Tensor:
        return torch.randint(3, 64, (2, PROMPT), generator=torch.Generator().manual_seed(3))


def decoded(model: PreTrainedModel, room: Room, profile: FasaProfile | None, config: FasaConfig, **options: Any) -> Any:
    """Tokens and logits of a padded batch, and the counts."""
    mask = torch.ones_like(room.prompt)
    mask[1, :20] = 0
    scorer = options.pop("scorer", None)
    with enable(model, profile, config, scorer=scorer) as fasa:
        tokens, logits = generate(model, room.prompt, mask, **options)
        return {"tokens": tokens, "logits": logits, "stats": fasa.stats.as_dict(), "layers": fasa.stats.per_layer}


def zero_setup(room: Room, **options: Any) -> Any:
    model = room.model(**options)
    with enable(model, config=FasaConfig(n_fac=24, criterion="weighted_variance")) as fasa:
        tokens, logits = generate(model, room.prompt)
        assert fasa.profile is not None
        return {"tokens": tokens, "logits": logits, "stats": fasa.stats.as_dict(), **fasa.profile.tables()}


def calibrated(room: Room, **options: Any) -> Any:
    found = calibrate(room.model(**options), [room.prompt[0]], top_k=64, max_new_tokens=4, progress=False)
    return {**found.tables(), "frequencies": found.layout.frequencies, "chunks": found.layout.chunks}


def head_budgets(room: Room) -> Any:
    """Layer 0 gives the head of rank 0 65 keys and that of rank 1 195, more than the padded row ever has."""
    return decoded(room.model(), room, room.profile(), FasaConfig(n_fac=119, layer_budgets=HEADS, dense_layers=()))


def pyramid(room: Room) -> Any:
    return decoded(room.model(), room, room.profile(), FasaConfig(n_fac=24, layer_budgets="pyramid"))


def paper(room: Room) -> Any:
    return decoded(room.model(), room, room.profile(), FasaConfig.paper(n_fac=24))


def sparse_prefill(room: Room) -> Any:
    return decoded(room.model(), room, room.profile(), FasaConfig(n_fac=24, prefill="sparse"))


def block_prefill(room: Room) -> Any:
    """Four blocks of queries; how many blocks of keys they read differs between the heads."""
    prompt = torch.randint(3, 64, (1, 480), generator=torch.Generator().manual_seed(7))
    model, config = room.model(), FasaConfig(n_fac=24, prefill="blocks", prefill_share=1.0, prefill_mass=0.7)
    with enable(model, room.profile(), config) as fasa:
        tokens, logits = generate(model, prompt)
        return {"tokens": tokens, "logits": logits, "stats": fasa.stats.as_dict(), "layers": fasa.stats.per_layer}


def static_cache(room: Room) -> Any:
    options = {"cache_implementation": "static", "disable_compile": True}
    return decoded(room.model(), room, room.profile(), FasaConfig(n_fac=24), **options)


def own_caches(room: Room) -> Any:
    """FASA-C of a fixed size with budgets by head, and FASA-M."""
    results = {}
    for name, placed in {"static": {"max_cache_len": PROMPT + 20}, "host": {"placement": "host"}}.items():
        model, profile, config = room.model(), room.profile(), FasaConfig(n_fac=24, layer_budgets=HEADS)
        cache = FasaCache(model, profile, config, **placed)
        results[name] = decoded(model, room, profile, config, **cache_argument(model, cache))
    return results


def log_likelihoods(room: Room) -> Any:
    """Every query of the second half of a text selects, in one forward."""
    model = room.model()
    with torch.no_grad(), enable(model, room.profile(), FasaConfig(n_fac=24)) as fasa:
        with fasa.sparse_from(torch.tensor([PROMPT // 2])):
            logits = model(room.prompt).logits
        scores = logits[:, :-1].log_softmax(-1).gather(-1, room.prompt[:, 1:, None])
        return {"scores": scores, "stats": fasa.stats.as_dict()}


def baselines(room: Room) -> Any:
    model, profile, config = room.model(), room.profile(), FasaConfig(n_fac=24)
    channels = channel_weights(model, [room.prompt[0]])
    scorers: dict[str, Any] = {
        "double_sparsity": scorer_factory("double_sparsity", channels=channels),
        "vattention": scorer_factory("vattention", profile),
        "snapkv": scorer_factory("snapkv"),
    }
    return {
        "channels": channels,
        **{name: decoded(model, room, None, config, scorer=scorer) for name, scorer in scorers.items()},
    }


def fused(room: Room) -> Any:
    """GPT-NeoX shards one fused projection, Phi-3 gathers its own: there every rank holds all heads."""
    return {
        name: decoded(room.model(name), room, None, FasaConfig(n_fac=24)) for name in ("GPT-NeoX", "Phi-3 (long RoPE)")
    }


def learned_sinks(room: Room) -> Any:
    return decoded(room.model("GraniteSWA", eager=True), room, None, FasaConfig(n_fac=24))


def evaluated(room: Room) -> Any:
    """``fasa_hf``, which calibrates on a text before the tasks and keeps the profile."""
    from lm_eval.api.instance import Instance  # imported by each rank, for seconds

    from fasa_flex.lm_eval.model import FasaHFLM

    cache = room.folder / f"profiles of {room.ranks}"
    options = {"tp_plan": "auto"} if room.ranks > 1 else {}
    source = {"calibration_source": room.folder / WORDS, "profile_cache": cache}
    texts = [" ".join(f"w{token}" for token in row) for row in room.prompt.tolist()]
    for _ in range(2):  # the second finds the profile of the first
        lm = FasaHFLM(str(room.folder / "Llama"), n_fac=24, sparse_tail=60, device="cpu", **source, **options)
    scored = [Instance("loglikelihood", {}, (text, f" w{nth + 7} w9"), nth) for nth, text in enumerate(texts)]
    asked = [Instance("generate_until", {}, (text, {"until": ["w5"], "max_gen_toks": 9}), 0) for text in texts]
    answers = {"scores": lm.loglikelihood(scored), "texts": lm.generate_until(asked)}
    assert lm.calibration.record is not None
    found = {"cached": lm.calibration.record["cached"], "folders": sorted(each.name for each in cache.iterdir())}
    return {**answers, **found, "account": lm.get_model_info()["fasa"]["tasks"]}


WORDS = "words.txt"
"""A text to calibrate on, in `Room.folder`."""

CASES: dict[str, Callable[[Room], Any]] = {
    case.__name__: case
    for case in (
        *(
            zero_setup,
            calibrated,
            head_budgets,
            pyramid,
            paper,
            sparse_prefill,
            block_prefill,
            static_cache,
            own_caches,
            log_likelihoods,
            baselines,
        ),
        *(fused, learned_sinks, evaluated),
    )
}


def one_head(room: Room) -> Any:
    return repr(enable(room.model("one head")))


def queries_alone(room: Room) -> Any:
    """Keys and values are gathered on every rank, queries are not."""
    styles = {"q": "colwise", "k": "colwise_gather_output", "v": "colwise_gather_output", "o": "rowwise"}
    plan = {f"model.layers.*.self_attn.{name}_proj": style for name, style in styles.items()}
    return repr(enable(room.model(tp_size=RANKS, tp_plan=plan), room.profile()))


def by_layers(room: Room) -> Any:
    return repr(enable(room.model(pp_size=RANKS), room.profile()))


def fsdp2(room: Room) -> Any:
    """Parameters are sharded and gathered again for each forward."""
    return {case.__name__: case(room, fsdp_size=RANKS) for case in (calibrated, zero_setup)}


def alone(model: Any, prompt: Tensor) -> Any:
    """A wrapped or plain model on one row."""
    with enable(model, config=FasaConfig(n_fac=24)) as fasa:
        return {"tokens": generate(unwrapped(model), prompt)[0], "stats": fasa.stats.as_dict()}


def data_parallel(room: Room) -> Any:
    """Each rank reads a row of its own, with a profile of its own, as after ``Accelerator.prepare``."""
    rank = torch.distributed.get_rank()
    wrapper = torch.nn.parallel.DistributedDataParallel(Room(room.folder).model())
    return alone(wrapper, room.prompt[rank : rank + 1])


ONLY_IN_TWO: dict[str, Callable[[Room], Any]] = {
    case.__name__: case for case in (one_head, queries_alone, by_layers, fsdp2, data_parallel)
}


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), CUDA_VISIBLE_DEVICES="")
    at_most = timedelta(minutes=2)  # where the other rank has failed
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, at_most, RANKS, rank)
    results = {}
    for name, case in {**CASES, **ONLY_IN_TWO}.items():
        try:
            results[name] = case(Room(folder, RANKS))
        except Exception as error:  # of both ranks alike, or the other one would wait
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two_processes(folder: Path) -> list[dict[str, Any]]:
    """The results of every case on each of two ranks (gloo, CPU)."""
    torch.multiprocessing.spawn(_rank, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
