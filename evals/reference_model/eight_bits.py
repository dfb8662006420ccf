"""Weights in eight bits, so that a model of 48 M parameters fits into the repository.

    python -m evals.reference_model.eight_bits pack runs/large evals/reference_model_large
    python -m evals.reference_model.eight_bits unpack evals/reference_model_large runs/reference_model_large

Every row of a matrix, the weights of one output, is rounded to 255 levels between plus and minus its largest weight, so
that no weight changes by more than half a level; vectors (of norms) stay float32. `pack` writes shards of less than
16 MiB, an index, and copies of config and tokenizer; `unpack` turns them into a float32 folder for
``from_pretrained``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasa_flex.saving import replacing

INDEX = "eight_bits.index.json"
SHARD_BYTES = 16 * 2**20 - 2**16
"""Most bytes of a shard's tensors, so that with its header it stays below 16 MiB."""
SCALE = ".scale"
"""Suffix of a matrix's name for the size of its rows' levels, float32 [rows, 1]."""
WEIGHTS = "model.safetensors"
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that are copied unchanged."""


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with the size of each row's levels, vectors in float32."""
    packed = {}
    for name, weight in weights.items():
        weight = weight.float()
        if weight.dim() == 2:
            level = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            packed[name] = (weight / level).round().clamp(-127, 127).to(torch.int8)
            packed[name + SCALE] = level
        else:
            packed[name] = weight.contiguous()
    return packed


def restored(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `rounded`: weights in float32 under their original names."""
    return {
        name: tensor.float() * packed[name + SCALE] if name + SCALE in packed else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def pack(trained: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a trained model's weights into ``out`` in eight bits, in place of an earlier packing.

    Args:
        trained: folder of ``model.safetensors``, config and tokenizer.
        out: created if it does not exist.
        shard_bytes: most bytes of a shard's tensors.
    """
    packed = rounded(load_file(trained / WEIGHTS))
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in packed.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"eight_bits-{number}-of-{len(shards)}.safetensors" for number in range(1, len(shards) + 1)]
    with replacing(out) as beside:
        for shard_name, shard in zip(names, shards, strict=True):
            save_file(shard, beside / shard_name)
        (beside / INDEX).write_text(json.dumps({"shards": names, "tensors": len(packed)}, indent=2) + "\n")
        for name in BESIDE:
            shutil.copyfile(trained / name, beside / name)
    for former in out.glob("eight_bits-*.safetensors"):
        if former.name not in names:
            former.unlink()


def unpack(folder: Path, out: Path) -> None:
    """Make a folder for ``from_pretrained`` from a packed one.

    Raises:
        ValueError: ``folder`` is not packed, or has lost tensors.
    """
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has no {INDEX}, so it is not packed; make it with pack, or load it as it is.")
    index = json.loads((folder / INDEX).read_text())
    packed = {name: tensor for shard in index["shards"] for name, tensor in load_file(folder / shard).items()}
    if len(packed) != index["tensors"]:
        raise ValueError(f"{folder} has {len(packed)} tensors, its index {index['tensors']}; pack the model again.")
    with replacing(out) as beside:
        save_file(restored(packed), beside / WEIGHTS, metadata={"format": "pt"})
        for name in BESIDE:
            shutil.copyfile(folder / name, beside / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("folder", type=Path, help="folder to pack or unpack")
    parser.add_argument("out", type=Path, help="folder of the result")
    args = parser.parse_args()
    convert = pack if args.action == "pack" else unpack
    convert(args.folder, args.out)


if __name__ == "__main__":
    main()
