"""Seconds of a decode step on one GPU and on several, by transformers' tensor parallelism, dense and under FASA.

    python -m evals.bench.tensor_parallel --out runs                       # one GPU, then two of the machine's
    python -m evals.bench.tensor_parallel --device cpu --shape tiny --layers 2 --contexts 300 --batches 1 --rounds 3

Every number of ranks runs in processes of its own (torchrun), on the same weights, keys and values. A rank fills a
static cache of exactly the context's length with its own heads, and decodes the last token again and again, as a CUDA
graph where that can be captured. The variants run in turns. Layers are cut from the shape, and all of them are sparse.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.distributed import DistributedConfig

from fasa_flex.bench import caches
from fasa_flex.bench.record import RowLedger, command_line, provenance
from fasa_flex.bench.settings import Settings
from fasa_flex.bench.shapes import SHAPES, Shape, random_profile
from fasa_flex.bench.timing import graphed, interleave
from fasa_flex.bench.variants import Variant, config_of, variants
from fasa_flex.caches.fasa_cache import FasaCache
from fasa_flex.core.completion import BLOCK
from fasa_flex.hf.compatibility import cache_argument
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.model.enable import enable

MODULE = "evals.bench.tensor_parallel"
PIECE, ROWS = 4096, "rows.jsonl"


def models_of(
    kinds: list[Variant], shape: Shape, settings: Settings, device: torch.device, ranks: int
) -> dict[str, PreTrainedModel]:
    """A model for each variant, on the same weights: this rank's part of those that every rank draws alike."""
    made: dict[str, PreTrainedModel] = {}
    layers, positions = settings.layers or shape.layers, max(settings.contexts) + 1
    for variant in kinds:
        torch.manual_seed(0)
        model = shape.model(layers, positions, settings.dtype, device)
        if ranks > 1:  # as from_pretrained does with distributed_config=, which would read the weights from a folder
            config, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_size=ranks))
            model = model.maybe_distribute_model(model, config, mesh)
        first = next(iter(made.values()), model)
        for module, same in zip(model.modules(), first.modules(), strict=True):
            module._parameters = same._parameters
        model.set_attn_implementation(variant.attention)
        made[variant.name] = model
    return made


def chosen(settings: Settings) -> list[Variant]:
    """The sparse variants, whose caches the dense ones share, and the dense ones."""
    found = [variant for variant in variants(settings) if variant.placement == "device"]
    return sorted(found, key=lambda variant: variant.kind != "sparse")


@torch.no_grad()
def fill(cache: Any, model: PreTrainedModel, shape: Shape, batch: int, length: int) -> None:
    """Write random tokens into every layer, this rank's heads of the same tokens under any number of ranks."""
    shard, device, layers = HeadShard.of(model), model.device, model.config.num_hidden_layers
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, length, PIECE):
        size = (batch, shape.kv_heads, min(PIECE, length - start), shape.head_dim)
        states = [torch.randn(size, generator=generator, device=device, dtype=model.dtype) for _ in range(2)]
        key, value = (shard.own(whole, 1).contiguous() for whole in states)
        for layer in range(layers):
            cache.update(key, value, layer)


def steps_of(
    models: dict[str, PreTrainedModel], shape: Shape, batch: int, context: int, settings: Settings, stack: ExitStack
) -> Iterator[tuple[str, Callable[[], Tensor], Any]]:
    """Each variant's name, its step and its cache; a step returns the logits and can be repeated."""
    made: list[Any] = []
    for variant in chosen(settings):
        model, config = models[variant.name], config_of(variant, settings, ())
        profile = random_profile(shape, model, model.config.num_hidden_layers)
        cache: Any = StaticCache(config=model.config, max_cache_len=context)
        if variant.kind == "sparse":
            cache = FasaCache(model, profile, config, max_cache_len=context)
            stack.enter_context(enable(model, profile, config))
        if not any(caches.share(cache, other, context) for other in made):
            fill(cache, model, shape, batch, context - 1)
        made.append(cache)
        yield variant.name, step_of(model, cache, batch, context), cache


def step_of(model: PreTrainedModel, cache: Any, batch: int, context: int) -> Callable[[], Tensor]:
    """A step that decodes the last token of the context."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    positions = torch.full_like(ids, context - 1)

    def step() -> Tensor:
        caches.rewind(cache, context - 1)
        logits: Tensor = model(ids, position_ids=positions, **cache_argument(model, cache)).logits
        return logits

    return step


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> None:
    """Measure every row on this rank; rank 0 appends them to the file `ROWS` of ``--folder``."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings, folder = settings_of(arguments), arguments.folder
    shape, device = SHAPES[arguments.shape], settings.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    models = models_of(chosen(settings), shape, settings, device, ranks)
    for batch in settings.batches:
        for stated in settings.contexts:
            context = stated - (stated % BLOCK == 0)  # every BLOCK-th token also updates the completion's state
            rows = []
            with ExitStack() as stack:
                steps, sizes = {}, {}
                for name, step, cache in steps_of(models, shape, batch, context, settings, stack):
                    file = folder / f"{batch} {context} {name}.pt"
                    error = agreement(step().float().cpu(), file, writes=ranks == 1 and rank == 0)
                    steps[name], how = graphed(step, device)
                    sizes[name] = {"timed": how, "cache": caches.nbytes(cache), "error": error}
                times = interleave(steps, device, arguments.rounds, float("inf"))  # as many rounds on every rank
            for name, timing in times.items():
                key = {"ranks": ranks, "batch": batch, "context": stated, "name": name, "layers": arguments.layers}
                rows.append({**key, "seconds": timing.median, "quartiles": timing.quartiles(), **sizes[name]})
            if rank == 0:
                with (folder / ROWS).open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            del steps, step, cache
    if ranks > 1:
        torch.distributed.destroy_process_group()


def agreement(logits: Tensor, file: Path, *, writes: bool) -> float | None:
    """The logits' distance from those of one rank, as a share of their norm; None if one rank has left none."""
    if writes:
        torch.save(logits, file)
    if not file.exists():
        return None
    expected: Tensor = torch.load(file)
    return float((logits - expected).norm() / expected.norm())


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The benchmark's settings, with the default's budget."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = (tuple(map(int, arguments.contexts.split(","))), tuple(map(int, arguments.batches.split(","))))
    backends = ("triton",) if device.type == "cuda" else ("gather",)  # what "auto" takes for a decoded token
    return Settings(
        device, dtype, (arguments.shape,), *rows, layers=arguments.layers, backends=backends, modes=("eager",)
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with each variant's speed-up over one rank and over the best dense step of its ranks."""
    seconds = {(row["batch"], row["context"], row["name"], row["ranks"]): row["seconds"] for row in rows}
    lines = [
        "| batch | context | step | GPUs | ms | over one GPU | over the best dense |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    for (batch, context, name, ranks), found in sorted(seconds.items()):
        alone = seconds.get((batch, context, name, 1))
        beside = [key for key in seconds if (*key[:2], key[3]) == (batch, context, ranks)]
        dense = min(seconds[key] for key in beside if not key[2].startswith("FASA"))
        scaled = "-" if alone is None else f"{alone / found:.2f}x"
        lines.append(
            f"| {batch} | {context} | {name} | {ranks} | {found * 1e3:.2f} | {scaled} | {dense / found:.2f}x |"
        )
    return "\n".join(lines)


def launch(arguments: argparse.Namespace) -> int:
    """Run every number of ranks in its own processes, and keep what they have measured."""
    settings = settings_of(arguments)
    head = provenance(command_line(MODULE), settings.device) | {
        "settings": settings.to_dict(),
        "shape": arguments.shape,
    }
    ledger = RowLedger(arguments.out / f"tensor_parallel_{settings.device.type}.json", head, fresh=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / ROWS
        for ranks in map(int, arguments.ranks.split(",")):
            rows.write_text("")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            passed = ["-m", MODULE, *sys.argv[1:], "--folder", name]
            failed |= subprocess.run([*command, *passed], check=False).returncode
            for line in rows.read_text().splitlines():
                ledger.add(json.loads(line))
    print(table(ledger.rows))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, each with a GPU, separated by commas")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES, help="the model's shape")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--batches", default="1,8", help="numbers of rows, separated by commas")
    parser.add_argument("--contexts", default="32768,131072", help="keys of a row, separated by commas")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each variant")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the processes' rows and logits
    arguments = parser.parse_args()
    if arguments.folder is not None:
        measure(arguments)
        return 0
    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main())
